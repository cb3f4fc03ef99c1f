"""Run the Prefect server of the local stack behind a check of Host and Origin, which Prefect lacks."""

import sys

import uvicorn
from prefect.server.api.server import create_app

from infra.local.origin import with_origin_check
from infra.local.processes import HOST
from nightshift.core.stage import build_parser


def main() -> None:
    """Serve Prefect's API, UI and background services until SIGTERM."""
    parser = build_parser(sys.modules[__name__])
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    uvicorn.run(with_origin_check(create_app(final=True)), host=HOST, port=port, log_level="warning")


if __name__ == "__main__":
    main()
