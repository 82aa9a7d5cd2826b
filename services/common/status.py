"""Domain errors over gRPC: status code and `google.rpc.ErrorInfo` (domain "mulligan"), in both directions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from mulligan.common.errors import CallFailed, Code, DomainError, Reason
from mulligan.common.text import bounded

log = structlog.get_logger()
DOMAIN = "mulligan"
# Metadata that the contracts promise of an error, and that its receiver cannot do without.
_PROMISED: dict[Reason, tuple[str, ...]] = {
    Reason.DISK_FULL: ("folder", "free_bytes", "needed_bytes"),
    Reason.FOLDER_REMOVED: ("folder",),
}
# What a handler and gRPC itself raise when a call has ended meanwhile: by its caller, or with its connection or server.
CALL_ENDED = (asyncio.CancelledError, grpc.aio.InternalError)
_MOST_DIGITS = 20  # of a number of bytes


def code_number(code: Code) -> int:
    """The number of the google.rpc.Code."""
    return int(code_pb2.Code.Value(code))


def code_name(number: int) -> str:
    """Raises ValueError for a number that is no google.rpc.Code."""
    return str(code_pb2.Code.Name(number))


def to_status(error: DomainError) -> grpc.Status:
    details = [any_pb2.Any(), any_pb2.Any()]
    details[0].Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if error.retry_after is None:
        details.pop()
    else:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(error.retry_after)
        details[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(status_pb2.Status(code=code_number(error.code), message=error.message, details=details))


def from_rpc_error(error: grpc.aio.AioRpcError) -> DomainError | None:
    """The domain error that a status carries. None if it carries none of this project, or one that cannot be used."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # typed for synchronous calls only
        return None if status is None else _from_status(status)
    except (ValueError, OverflowError, DecodeError):  # another program wrote it: the details contradict the code, …
        return None


def _from_status(status: status_pb2.Status) -> DomainError | None:
    """Raises ValueError, OverflowError and DecodeError."""
    info: error_details_pb2.ErrorInfo | None = None
    retry_after = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToTimedelta()
    if info is None or info.domain != DOMAIN:
        return None
    result = domain_error(info.reason, status.message, info.metadata)
    if result is not None:
        result.retry_after = retry_after
    return result


def domain_error(reason: str, message: str, metadata: Mapping[str, str]) -> DomainError | None:
    """The error as its service raised it. None for a reason that this version does not know, and for an error without
    the metadata that the contract promises of it: no caller could act on that."""
    if reason not in Reason.__members__:
        return None
    if lacking := [name for name in _PROMISED.get(Reason(reason), ()) if not _is_usable(name, metadata.get(name, ""))]:
        log.warning("a service's error lacks metadata", reason=reason, lacking=lacking, message=bounded(message, 200))
        return None
    result = DomainError(Reason(reason), message)
    result.metadata = dict(metadata)
    return result


def fill_item_error(message: Any, error: DomainError) -> None:
    """Fills the error of an item in an answer to several requests: `GenerateError`, `StartError`, `StepError` or
    `AddError`."""
    message.code = code_number(error.code)
    message.reason = error.reason
    message.message = error.message
    message.metadata.update(error.metadata)
    if error.retry_after is not None and "retry_delay" in message.DESCRIPTOR.fields_by_name:
        message.retry_delay.FromTimedelta(error.retry_after)


def item_error(message: Any, address: str, call: str) -> DomainError | CallFailed:
    """What `fill_item_error` wrote, in the answer of the server at `address`. CallFailed where `domain_error` is None.
    Raises ValueError for a code that is none, and OverflowError for a delay that is too long."""
    known = domain_error(message.reason, message.message, message.metadata)
    if known is None:
        return CallFailed(address, call, message.reason or code_name(message.code), message.message)
    if "retry_delay" in message.DESCRIPTOR.fields_by_name and message.HasField("retry_delay"):
        known.retry_after = message.retry_delay.ToTimedelta()
    return known


def _is_usable(name: str, value: str) -> bool:
    return value.isdecimal() and len(value) <= _MOST_DIGITS if name.endswith("_bytes") else bool(value)
