"""`concentrate demo`: a local web page on which one drops an image and sees the answer by vertical."""

import asyncio
import socket
import warnings

import pydantic
import uvicorn

from concentration.errors import ConfigError
from concentration.serving.web import build_app
from concentration.stages.predict import ServingConfig, build_answerer


class DemoConfig(ServingConfig):
    """Serves until it is stopped.

    best: how many classes of every vertical are sent to the page.
    host: 127.0.0.1 answers this machine alone, 0.0.0.0 everyone who reaches it.
    port: 0 takes any that is free.
    """

    best: pydantic.PositiveInt = 3
    host: str = "127.0.0.1"
    port: int = pydantic.Field(default=8000, ge=0, lt=2**16)


def demo(config: DemoConfig) -> None:
    """Runs the verb.

    Raises:
        ConfigError: there is no such export, or the port is taken.
        DataError: a file of the export is damaged.
    """
    warnings.filterwarnings("ignore", module="PIL")  # an image is answered or is an error
    export = config.load_export()
    answerer = build_answerer(config, is_by_vertical=True)
    with _listen(config) as listening:
        address = f"http://{config.host}:{listening.getsockname()[1]}"
        hosts = ["*"] if config.host not in _LOCAL else list(_LOCAL)
        app = build_app(answerer, export, export.path.name, hosts)
        print(f"{address}: open it and drop an image on it; Ctrl-C ends", flush=True)
        server = _Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # which the server passes on when it has ended
            print()


class _Server(uvicorn.Server):
    """One that ends though clients go on sending, or have stopped in the middle; uvicorn's waits for them for ever."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_HANG_UP_SECONDS, self._hang_up)
        await super().shutdown(sockets)

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


#: After Ctrl-C, for what is being answered.
_HANG_UP_SECONDS = 2.0

_LOCAL = ("127.0.0.1", "localhost")


def _listen(config: DemoConfig) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
        listening.listen()  # before the address is told
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"host={config.host} port={config.port}: cannot listen there ({error.strerror or error}); give another port, "
            "or port=0 for any that is free"
        ) from None
    return listening
