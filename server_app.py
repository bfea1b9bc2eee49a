"""The ServerApp that `flwr run` starts; see `autoflip_flwr.app.server`."""

from flwr.serverapp import ServerApp

from autoflip_flwr.app import server

app = ServerApp()
app.main()(server.serve)
