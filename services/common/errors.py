"""Domain errors: the declared failures of the services. `status.py` carries them over gRPC.

A service raises a `DomainError` with a declared `Reason`; its client raises the same exception on the other side. Any
other exception that escapes a handler becomes INTERNAL. https://google.aip.dev/193
"""

from __future__ import annotations

import re
import secrets
from datetime import timedelta
from enum import StrEnum

from mulligan.common.text import bounded

# Longest message of an error, and longest metadata value, in characters of their JSON form.
MESSAGE_LIMIT = 1_500
METADATA_LIMIT = 500
_INCIDENT = re.compile(r"incident [0-9a-f]{8}")  # as `fault` tells it


class Code(StrEnum):
    """The gRPC status codes in use, by name.  https://grpc.github.io/grpc/core/md_doc_statuscodes.html"""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    ABORTED = "ABORTED"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


class Reason(StrEnum):
    """Why a call failed. `_CODES` maps each reason to one status code."""

    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    INVALID_FIELD = "INVALID_FIELD"
    BAD_PAGE_TOKEN = "BAD_PAGE_TOKEN"
    BAD_CREDENTIAL = "BAD_CREDENTIAL"
    INSUFFICIENT_ROLE = "INSUFFICIENT_ROLE"
    CALLER_LIMIT = "CALLER_LIMIT"
    RUN_CREDENTIAL = "RUN_CREDENTIAL"
    DISK_FULL = "DISK_FULL"
    FOLDER_REMOVED = "FOLDER_REMOVED"
    STATE_DAMAGED = "STATE_DAMAGED"
    # environment
    UNKNOWN_ENVIRONMENT = "UNKNOWN_ENVIRONMENT"
    UNKNOWN_TASK = "UNKNOWN_TASK"
    UNKNOWN_EPISODE = "UNKNOWN_EPISODE"
    EPISODE_EXPIRED = "EPISODE_EXPIRED"
    EPISODE_CONFLICT = "EPISODE_CONFLICT"
    EPISODE_FINISHED = "EPISODE_FINISHED"
    STEP_SKIPPED = "STEP_SKIPPED"
    STEP_CONFLICT = "STEP_CONFLICT"
    CAPACITY_REACHED = "CAPACITY_REACHED"
    ENVIRONMENT_FAILED = "ENVIRONMENT_FAILED"
    ENVIRONMENT_UNAVAILABLE = "ENVIRONMENT_UNAVAILABLE"
    FORK_UNSUPPORTED = "FORK_UNSUPPORTED"
    # policy
    EMPTY_PROMPT = "EMPTY_PROMPT"
    TOKEN_OUT_OF_VOCABULARY = "TOKEN_OUT_OF_VOCABULARY"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    TEMPLATE_ERROR = "TEMPLATE_ERROR"
    TEMPLATE_REWRITES_HISTORY = "TEMPLATE_REWRITES_HISTORY"
    POLICY_VERSION_TOO_OLD = "POLICY_VERSION_TOO_OLD"
    QUEUE_FULL = "QUEUE_FULL"
    BAD_WEIGHTS_URI = "BAD_WEIGHTS_URI"
    WEIGHTS_NOT_FOUND = "WEIGHTS_NOT_FOUND"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    MODEL_MISMATCH = "MODEL_MISMATCH"
    VERSION_CONFLICT = "VERSION_CONFLICT"
    VERSION_NOT_KEPT = "VERSION_NOT_KEPT"
    CANARY_FAILED = "CANARY_FAILED"
    UNKNOWN_POLICY = "UNKNOWN_POLICY"
    DEFAULT_POLICY = "DEFAULT_POLICY"
    POLICY_FROZEN = "POLICY_FROZEN"
    POLICY_REFUSED = "POLICY_REFUSED"
    ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"
    UNSUPPORTED_OPTION = "UNSUPPORTED_OPTION"
    UNKNOWN_ADAPTER = "UNKNOWN_ADAPTER"
    UNSUPPORTED_MODEL = "UNSUPPORTED_MODEL"
    BAD_MODEL = "BAD_MODEL"
    UPLOAD_INCOMPLETE = "UPLOAD_INCOMPLETE"
    UPLOAD_STALLED = "UPLOAD_STALLED"
    UPLOAD_TOO_LARGE = "UPLOAD_TOO_LARGE"
    # memory
    UNKNOWN_REFLECTION = "UNKNOWN_REFLECTION"
    REQUEST_CONFLICT = "REQUEST_CONFLICT"
    UNKNOWN_VERSION = "UNKNOWN_VERSION"
    REVISION_CONFLICT = "REVISION_CONFLICT"
    RAW_ENTRY = "RAW_ENTRY"
    UNKNOWN_USE = "UNKNOWN_USE"
    SNAPSHOT_REDACTED = "SNAPSHOT_REDACTED"
    NO_EMBEDDER = "NO_EMBEDDER"
    # trainer
    UNKNOWN_LEARNER = "UNKNOWN_LEARNER"
    LEARNER_OWNED = "LEARNER_OWNED"
    LEARNER_CONFLICT = "LEARNER_CONFLICT"
    SEQUENCE_MISMATCH = "SEQUENCE_MISMATCH"
    NOT_FINITE = "NOT_FINITE"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    CHECKPOINT_NOT_FOUND = "CHECKPOINT_NOT_FOUND"
    CHECKPOINT_MISMATCH = "CHECKPOINT_MISMATCH"
    UNKNOWN_RUN = "UNKNOWN_RUN"
    RUN_CONFLICT = "RUN_CONFLICT"
    RUN_COMPLETED = "RUN_COMPLETED"
    ENVIRONMENT_CHANGED = "ENVIRONMENT_CHANGED"
    INVALID_SETTING = "INVALID_SETTING"
    SERVICE_UNAVAILABLE = "SERVICE_UNAVAILABLE"


_CODES: dict[Reason, Code] = {
    Reason.MALFORMED_MESSAGE: Code.INVALID_ARGUMENT,
    Reason.INVALID_FIELD: Code.INVALID_ARGUMENT,
    Reason.BAD_PAGE_TOKEN: Code.INVALID_ARGUMENT,
    Reason.BAD_CREDENTIAL: Code.UNAUTHENTICATED,
    Reason.INSUFFICIENT_ROLE: Code.PERMISSION_DENIED,
    Reason.CALLER_LIMIT: Code.RESOURCE_EXHAUSTED,
    Reason.RUN_CREDENTIAL: Code.PERMISSION_DENIED,
    Reason.DISK_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.FOLDER_REMOVED: Code.FAILED_PRECONDITION,
    Reason.STATE_DAMAGED: Code.DATA_LOSS,
    Reason.UNKNOWN_ENVIRONMENT: Code.NOT_FOUND,
    Reason.UNKNOWN_TASK: Code.NOT_FOUND,
    Reason.UNKNOWN_EPISODE: Code.NOT_FOUND,
    Reason.EPISODE_EXPIRED: Code.NOT_FOUND,
    Reason.EPISODE_CONFLICT: Code.ALREADY_EXISTS,
    Reason.EPISODE_FINISHED: Code.FAILED_PRECONDITION,
    Reason.STEP_SKIPPED: Code.FAILED_PRECONDITION,
    Reason.STEP_CONFLICT: Code.FAILED_PRECONDITION,
    Reason.CAPACITY_REACHED: Code.RESOURCE_EXHAUSTED,
    Reason.ENVIRONMENT_FAILED: Code.INTERNAL,
    Reason.ENVIRONMENT_UNAVAILABLE: Code.FAILED_PRECONDITION,
    Reason.FORK_UNSUPPORTED: Code.UNIMPLEMENTED,
    Reason.EMPTY_PROMPT: Code.INVALID_ARGUMENT,
    Reason.TOKEN_OUT_OF_VOCABULARY: Code.INVALID_ARGUMENT,
    Reason.PROMPT_TOO_LONG: Code.INVALID_ARGUMENT,
    Reason.TEMPLATE_ERROR: Code.INVALID_ARGUMENT,
    Reason.TEMPLATE_REWRITES_HISTORY: Code.FAILED_PRECONDITION,
    Reason.POLICY_VERSION_TOO_OLD: Code.FAILED_PRECONDITION,
    Reason.QUEUE_FULL: Code.RESOURCE_EXHAUSTED,
    Reason.BAD_WEIGHTS_URI: Code.INVALID_ARGUMENT,
    Reason.WEIGHTS_NOT_FOUND: Code.NOT_FOUND,
    Reason.CHECKSUM_MISMATCH: Code.FAILED_PRECONDITION,
    Reason.MODEL_MISMATCH: Code.FAILED_PRECONDITION,
    Reason.VERSION_CONFLICT: Code.FAILED_PRECONDITION,
    Reason.VERSION_NOT_KEPT: Code.NOT_FOUND,
    Reason.CANARY_FAILED: Code.FAILED_PRECONDITION,
    Reason.UNKNOWN_POLICY: Code.NOT_FOUND,
    Reason.DEFAULT_POLICY: Code.FAILED_PRECONDITION,
    Reason.POLICY_FROZEN: Code.FAILED_PRECONDITION,
    Reason.POLICY_REFUSED: Code.UNAVAILABLE,
    Reason.ENGINE_UNAVAILABLE: Code.UNAVAILABLE,
    Reason.UNSUPPORTED_OPTION: Code.INVALID_ARGUMENT,
    Reason.UNKNOWN_ADAPTER: Code.NOT_FOUND,
    Reason.UNSUPPORTED_MODEL: Code.INVALID_ARGUMENT,
    Reason.BAD_MODEL: Code.INVALID_ARGUMENT,
    Reason.UPLOAD_INCOMPLETE: Code.INVALID_ARGUMENT,
    Reason.UPLOAD_STALLED: Code.UNAVAILABLE,
    Reason.UPLOAD_TOO_LARGE: Code.RESOURCE_EXHAUSTED,
    Reason.UNKNOWN_REFLECTION: Code.NOT_FOUND,
    Reason.REQUEST_CONFLICT: Code.ALREADY_EXISTS,
    Reason.UNKNOWN_VERSION: Code.OUT_OF_RANGE,
    Reason.REVISION_CONFLICT: Code.ABORTED,
    Reason.RAW_ENTRY: Code.FAILED_PRECONDITION,
    Reason.UNKNOWN_USE: Code.NOT_FOUND,
    Reason.SNAPSHOT_REDACTED: Code.DATA_LOSS,
    Reason.NO_EMBEDDER: Code.FAILED_PRECONDITION,
    Reason.UNKNOWN_LEARNER: Code.NOT_FOUND,
    Reason.LEARNER_OWNED: Code.FAILED_PRECONDITION,
    Reason.LEARNER_CONFLICT: Code.ALREADY_EXISTS,
    Reason.SEQUENCE_MISMATCH: Code.FAILED_PRECONDITION,
    Reason.NOT_FINITE: Code.FAILED_PRECONDITION,
    Reason.MODEL_NOT_FOUND: Code.INVALID_ARGUMENT,
    Reason.CHECKPOINT_NOT_FOUND: Code.NOT_FOUND,
    Reason.CHECKPOINT_MISMATCH: Code.FAILED_PRECONDITION,
    Reason.UNKNOWN_RUN: Code.NOT_FOUND,
    Reason.RUN_CONFLICT: Code.ALREADY_EXISTS,
    Reason.RUN_COMPLETED: Code.FAILED_PRECONDITION,
    Reason.ENVIRONMENT_CHANGED: Code.FAILED_PRECONDITION,
    Reason.INVALID_SETTING: Code.INVALID_ARGUMENT,
    Reason.SERVICE_UNAVAILABLE: Code.UNAVAILABLE,
}


class DomainError(Exception):
    """A declared failure. `metadata` travels with it; `retry_after` becomes a google.rpc.RetryInfo.

    Message and metadata may quote foreign text, so they are cut: the status has to fit into the 8 KiB that HTTP/2
    implementations of gRPC allow.
    """

    def __init__(self, reason: Reason, message: str, *, retry_after: timedelta | None = None, **metadata: object):
        message = bounded(message, MESSAGE_LIMIT)
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.metadata = {key: bounded(str(value), METADATA_LIMIT) for key, value in metadata.items()}

    def told(self, message: str, **metadata: object) -> DomainError:
        """The same error with another message, and with further metadata. Names of another program's metadata may be
        those of this class's parameters."""
        result = DomainError(self.reason, message, retry_after=self.retry_after)
        result.metadata = self.metadata | {key: bounded(str(value), METADATA_LIMIT) for key, value in metadata.items()}
        return result

    @property
    def code(self) -> Code:
        return _CODES[self.reason]

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class ServiceUnavailable(Exception):
    """A service could not be reached within the caller's time limit. The message names the endpoint.

    `cause` is the last failure. `refusal` is the service's last answer if it was reached and asked for a later call.
    """

    def __init__(self, endpoint: str, seconds: float, cause: str, refusal: DomainError | None = None):
        super().__init__(f"{endpoint} was unreachable for {seconds:.0f} s: {cause}")
        self.endpoint = endpoint
        self.cause = cause
        self.refusal = refusal


class CallFailed(Exception):
    """A call failed without a declared reason: INTERNAL, DEADLINE_EXCEEDED, …"""

    def __init__(self, endpoint: str, method: str, code: str, details: str):
        super().__init__(f"{method} at {endpoint} failed: {code}: {details}")
        self.code = code

    @property
    def timed_out(self) -> bool:
        return self.code == "DEADLINE_EXCEEDED"


def incident(error: BaseException) -> str:
    """The id by which a caller's error is found in the server's log; always the same for one exception."""
    error.__dict__.setdefault("incident", secrets.token_hex(4))
    return str(error.__dict__["incident"])


def fault(error: BaseException) -> str:
    """What callers are told of an exception that nobody declared: the message of an INTERNAL status. What it says
    itself is for the server's log alone, as it may quote anything that the process knows."""
    return f"{type(error).__name__}, incident {incident(error)}: the server's log has it"


def without_incident(text: str) -> str:
    """The text without the ids of incidents: the same for all faults of one kind."""
    return _INCIDENT.sub("incident", text)


def invalid_field(field: str, expected: str) -> DomainError:
    return DomainError(Reason.INVALID_FIELD, f"{field}: expected {expected}", field=field, expected=expected)
