"""The ClientApp that nodes run; see `autoflip_flwr.apps`."""

from autoflip_flwr import apps

app = apps.client_app()
