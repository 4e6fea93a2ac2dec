"""Errors of the Hugging Face hub as sentences.

    with hub_errors("model", "openai-community/gpt2", revision, "config.json"):
        path = hf_hub_download("openai-community/gpt2", "config.json", revision=revision)

huggingface_hub raises its own exceptions, those of the operating system, those of its HTTP client
and, for a transfer that went wrong, RuntimeError and ValueError. Each of them becomes a HubError
here.
"""

import contextlib
from collections.abc import Iterator

from anew.errors import UserError
from anew.utils.disk_errors import is_disk_full

REFUSALS = (401, 403, 404)  # HTTP status: the same request gets the same answer later
CONTINUE = "run the same command again; the download continues where it stopped"


class HubError(UserError):
    """The hub refused or failed. `is_temporary`: the same request may succeed later."""

    def __init__(self, text: str, is_temporary: bool = False) -> None:
        super().__init__(text)
        self.is_temporary = is_temporary


class MissingFileError(HubError):
    """The repository is on the hub, and the file is not in it at this revision."""


@contextlib.contextmanager
def hub_errors(
    kind: str, repository: str, revision: str, path: str, again: str = CONTINUE
) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into a HubError.

    `kind` is "model" or "dataset"; `path` is a file or a folder in the repository. `again` is the
    advice for errors that may be temporary.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    subject = f"{repository}/{path}" if path else repository
    try:
        yield
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repository} is neither a local folder nor a public {kind} on the hub; check the "
            "name."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision} on the hub.") from error
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError
        raise HubError(
            f"the hub cannot be reached for {subject}, and the hub's cache does not hold it; "
            f"{again}.",
            is_temporary=True,
        ) from error
    except EntryNotFoundError as error:
        raise MissingFileError(
            f"{repository} has no {path} at revision {revision} on the hub."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        raise HubError(
            f"the hub answered {status} when asked for {subject}; {again}.",
            is_temporary=status not in REFUSALS,
        ) from error
    except UserError:
        raise
    except Exception as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, ConnectionError) or is_network_error(error):
            problem = f"the hub cannot be reached for {subject} ({first_line})"
        elif isinstance(error, OSError | RuntimeError | ValueError):
            problem = f"{subject} could not be transferred ({first_line})"
        else:
            raise
        is_permanent = isinstance(error, OSError) and is_disk_full(error)
        raise HubError(f"{problem}; {again}.", is_temporary=not is_permanent) from error


def is_network_error(error: Exception) -> bool:
    """Return whether the HTTP client of huggingface_hub raised `error`.

    Some of its exceptions pass through huggingface_hub. They are no OSError, and the client's
    package has changed its name between versions.
    """
    return type(error).__module__.startswith(("httpx", "httpcore"))
