"""Open a page that shows Spectral Forcing on a picture, how networks sample, and how runs went.

    python -m tools.explorer output/ --port 8501

It reads the given folders and writes nothing. Only this machine can open the page unless --host says otherwise, and it
asks no other machine for anything.
"""

import argparse
import errno
import socket
import sys
from pathlib import Path

from util.errors import UserError

LOOPBACK = ["127.0.0.1", "localhost", "::1"]


def serve(folders: list[str], host: str, port: int, browser: bool, device: str) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: a folder that does not exist, an address that is not free, or no Streamlit.
    """
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise UserError(f"There is no folder {', '.join(missing)}: name folders that hold runs or exports.")
    try:
        from streamlit import net_util
        from streamlit.web import bootstrap
    except ImportError as error:
        install = ".venv/bin/uv pip install --python .venv/bin/python -r pyproject.toml --extra explorer"
        raise UserError(f"The page needs Streamlit: {install}") from error
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        reason = (
            "another program uses it" if getattr(error, "errno", None) == errno.EADDRINUSE else str(error).rstrip(".")
        )
        raise UserError(f"Port {port} of {host} cannot be used: {reason}. --port and --host name others.") from error
    net_util.get_external_ip = lambda: None  # it asks a web service, whenever a page from elsewhere tries to connect
    options = {
        "server.address": host,
        "server.port": port,
        "server.headless": not browser,
        "server.allowedHosts": LOOPBACK if host in LOOPBACK else [],  # another name that leads here is an attack
        "server.fileWatcherType": "none",
        "server.maxUploadSize": 32,  # MB
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
        "client.showErrorLinks": False,
        "logger.hideWelcomeMessage": True,
        "theme.primaryColor": "#0072b2",
    }
    bootstrap.load_config_options(options)
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}   Ctrl-C ends it", flush=True)
    bootstrap.run(str(Path(__file__).with_name("page.py")), False, [device, *folders], options)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, or 2 after an error that one sentence explains."""
    parser = argparse.ArgumentParser(prog="python -m tools.explorer", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=["output"], metavar="FOLDER", help="runs and exports (output/)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8501, help="(default: %(default)s)")
    parser.add_argument("--no_browser", action="store_true", help="serve the page without opening it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of sampling (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        serve(args.folders, args.host, args.port, not args.no_browser, args.device)
    except UserError as error:
        print(f"explorer: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
