"""All our errors, so that a caller can see at a glance what to catch.

ShoalError
├── ConfigError             a person wrote something we cannot use: name the key and what to write
├── DataError               a data source breaks its task's contract: refuse it with the reasons
├── UnavailableError        something needed is away now (port, broker, disk space): say what to do
│   └── StaleMetadataError  what is known of released models expired, or our clock is wrong
├── PeerError               the other side broke the protocol: log, drop, carry on
├── PolicyError             this device's owner does not allow it: refuse with the reason
├── StoppedError            we were asked to end: tidy up and go
├── QuorumError             too few updates survived: abandon the round, try the next
├── ConflictError           somebody else moved first: reload and decide again
├── NotFoundError           the thing named does not exist: say where to look
├── UnauthorizedError       no credential or a wrong one: say which is needed, and nothing else
├── UntrustedModelError     digest, signature or lineage is wrong: keep the running version
├── UnfitModelError         the model is genuine but does not work here: keep the running version
└── IllegalTransitionError  our own bug: let it surface

A command that ends with one of these prints its message as one sentence and exits with status 1.
"""


class ShoalError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(ShoalError):
    """A setting, plan or command line that a person must change."""


class DataError(ShoalError):
    """A data source that cannot serve its task."""


class UnavailableError(ShoalError):
    """Something that is needed is not there now."""


class StaleMetadataError(UnavailableError):
    """What says which models are released has expired, by this device's clock."""


class PeerError(ShoalError):
    """The other side sent what it should not have sent."""


class PolicyError(ShoalError):
    """What is asked is beyond what this device's owner allows; says nothing of the data."""


class StoppedError(ShoalError):
    """Somebody asked us to end before the work was done; the message is their reason."""


class QuorumError(ShoalError):
    """Too few updates survived to commit a round, or too few devices joined to begin it."""

    def __init__(
        self, round_number: int, *, survivors: int, quorum: int, of_what: str = "updates"
    ) -> None:
        super().__init__(f"round {round_number} has {survivors} of the {quorum} {of_what} it needs")
        self.survivors, self.quorum = survivors, quorum


class ConflictError(ShoalError):
    """The row was changed by somebody else since it was read."""


class NotFoundError(ShoalError):
    """What was named does not exist."""


class UnauthorizedError(ShoalError):
    """The caller did not prove who it is."""


class UntrustedModelError(ShoalError):
    """A model version whose digest, signature or lineage is wrong."""


class UnfitModelError(ShoalError):
    """A genuine model version that does not work on this device."""


class IllegalTransitionError(ShoalError):
    """A lifecycle was given an event that its state does not accept."""


def innermost(error: BaseException) -> BaseException:
    """Return the first plain error inside nested exception groups, such as TaskGroups raise."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
