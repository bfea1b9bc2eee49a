"""The ServerApp that `flwr run` starts; see `autoflip_flwr.apps`."""

from flwr.serverapp import ServerApp

from autoflip_flwr import apps

app = ServerApp()
app.main()(apps.serve)
