"""The ClientApp that nodes run; see `autoflip_flwr.app.client`."""

from autoflip_flwr.app.client import client_app

app = client_app()
