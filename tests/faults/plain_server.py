"""The command line of `anew` with a server whose connections are those of uvicorn: a control."""

from unittest.mock import patch

from uvicorn.protocols.http.h11_impl import H11Protocol

from anew.cli.main import main
from anew.serve import connections

if __name__ == "__main__":
    with patch.object(connections, "BoundedConnection", H11Protocol):
        main()
