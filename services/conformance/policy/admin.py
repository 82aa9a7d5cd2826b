"""Checks of PolicyAdminService that change nothing: lists and refusals. `--writes` adds checks that change what serves
while they run."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from mulligan.conformance.policy.served import Served
from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.conformance.target import Refusal, all_pages
from mulligan.policy.v1 import policy_admin_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2 as policy_pb

suite: Suite[Served] = Suite()
_SHA256 = "0" * 64


def _safetensors(header: bytes, content: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + content


_NOTHING = _safetensors(b"{}      ")
_FOREIGN = _safetensors(
    b'{"no.such.tensor.positions":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},'
    b'"no.such.tensor.values":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    bytes(8),
)


async def available(served: Served) -> None:
    """Raises NotApplicable if the caller may not administer."""
    answer = await served.session.attempt("UnloadModel", pb.UnloadModelRequest(policy="no-such-policy"))
    if isinstance(answer, Refusal) and answer.code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        raise NotApplicable("this needs a token of the role admin (MULLIGAN_CLI_TOKEN)")


@suite.check("ListVersions", "page by page it lists the versions, newest first")
async def versions(served: Served) -> None:
    await available(served)
    found: list[int] = []
    name = served.policy.name
    async for page in all_pages(
        lambda token: served.session.ask(
            "ListVersions", pb.ListVersionsRequest(policy=name, page_size=2, page_token=token)
        )
    ):
        demand(len(page.versions) <= 2, "a page of at most 2 versions", f"{len(page.versions)}")
        found += [version.policy_version for version in page.versions]
        if len(found) >= 50:
            break
    demand(found == sorted(set(found), reverse=True), "versions, newest first, each once", found)


@suite.check("ListVersions", "a bad page token is BAD_PAGE_TOKEN, an unknown policy UNKNOWN_POLICY")
async def bad_lists(served: Served) -> None:
    await available(served)
    request = pb.ListVersionsRequest(policy=served.policy.name, page_token="no such token")
    await served.session.refused("ListVersions", request, "INVALID_ARGUMENT", "BAD_PAGE_TOKEN")
    unknown = pb.ListVersionsRequest(policy=f"no-such-policy-{uuid4()}")
    await served.session.refused("ListVersions", unknown, "NOT_FOUND", "UNKNOWN_POLICY")


@suite.check("UpdateWeights", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_updates(served: Served) -> None:
    await available(served)
    good: dict[str, Any] = {
        "policy": served.policy.name,
        "policy_version": 2**40,
        "kind": pb.WEIGHTS_KIND_FULL,
        "uri": "file:///no/such/folder/weights.safetensors",
        "sha256": _SHA256,
        "fingerprint": "x",
    }
    for field, value in (
        ("policy_version", 0),
        ("kind", pb.WEIGHTS_KIND_ORIGINAL),
        ("uri", ""),
        ("sha256", "A" * 64),
        ("sha256", ""),
        ("fingerprint", ""),
    ):
        await served.session.bad_field("UpdateWeights", pb.UpdateWeightsRequest(**(good | {field: value})), field)


@suite.check("UpdateWeights", "a file outside the weights folder is refused, and the old version serves on")
async def outside(served: Served) -> None:
    await available(served)
    request = pb.UpdateWeightsRequest(
        policy=served.policy.name,
        policy_version=2**40,
        kind=pb.WEIGHTS_KIND_FULL,
        uri="file:///etc/passwd",
        sha256=_SHA256,
        fingerprint=served.policy.fingerprint or "x",
    )
    answer = await served.session.attempt("UpdateWeights", request)
    allowed = [("INVALID_ARGUMENT", "BAD_WEIGHTS_URI"), ("FAILED_PRECONDITION", "POLICY_FROZEN")]
    if not served.offers(policy_pb.FEATURE_FULL_WEIGHTS):
        allowed.append(("INVALID_ARGUMENT", "UNSUPPORTED_OPTION"))
    refused = isinstance(answer, Refusal) and (answer.code, answer.reason) in allowed
    demand(refused, " or ".join(f"{code} {reason}" for code, reason in allowed), answer, request)
    now = (await served.session.ask("GetPolicy", policy_pb.GetPolicyRequest(policy=served.policy.name))).policy
    same = now.policy_version == served.policy.policy_version
    demand(same, f"version {served.policy.policy_version} serves on", f"version {now.policy_version}", request)


def _sparse(served: Served, content: bytes = _NOTHING, **header: Any) -> tuple[pb.UploadWeightsRequest, ...]:
    """The messages that upload a sparse file, at first one that changes nothing."""
    served.need(policy_pb.FEATURE_FULL_WEIGHTS)
    if not served.policy.sparse_uploads:
        raise NotApplicable("the policy does not offer sparse_uploads")
    fields: dict[str, Any] = {
        "policy": served.policy.name,
        "kind": pb.WEIGHTS_KIND_FULL,
        "size_bytes": len(content),
        "sha256": _SHA256,
        "base_sha256": _SHA256,
    }
    return (
        pb.UploadWeightsRequest(header=pb.UploadWeightsRequest.Header(**fields | header)),
        pb.UploadWeightsRequest(chunk=content),
    )


@suite.check("UploadWeights", "a sparse file with a base that is not kept is NOT_FOUND VERSION_NOT_KEPT")
async def unknown_base(served: Served) -> None:
    request = _sparse(served)
    await available(served)
    await served.session.refused("UploadWeights", request, "NOT_FOUND", "VERSION_NOT_KEPT")


@suite.check("UploadWeights", "a base that is no checksum, or that of an adapter, is INVALID_ARGUMENT INVALID_FIELD")
async def bad_bases(served: Served) -> None:
    requests = [_sparse(served, base_sha256=base) for base in ("A" * 64, "0" * 63, "x")]
    requests.append(_sparse(served, kind=pb.WEIGHTS_KIND_LORA, adapter_config=b'{"r": 4, "lora_alpha": 8}'))
    await available(served)
    for request in requests:
        await served.session.bad_field("UploadWeights", request, "header.base_sha256")


@suite.check("UploadWeights", "a sparse file makes a whole one of a version that is kept, or is refused")
async def sparse_files(served: Served) -> None:
    _sparse(served)
    if not served.options.writes:
        raise NotApplicable("it leaves an upload behind, which is removed after an hour: --writes")
    await available(served)
    listed = await served.session.ask("ListVersions", pb.ListVersionsRequest(policy=served.policy.name, page_size=1000))
    kept = (pb.VERSION_STATE_SERVING, pb.VERSION_STATE_KEPT)
    found = [each for each in listed.versions if each.state in kept and each.kind == pb.WEIGHTS_KIND_FULL]
    if not found:
        raise NotApplicable("no version of full weights is kept")
    base = found[0].sha256
    for _ in range(2):
        same = _sparse(served, base_sha256=base, sha256=base)
        answer = await served.session.ask("UploadWeights", same)
        demand(bool(answer.uri), "a URI", answer, same)
    another = _sparse(served, base_sha256=base)
    await served.session.refused("UploadWeights", another, "FAILED_PRECONDITION", "CHECKSUM_MISMATCH")
    for content in (_FOREIGN, b"no safetensors file"):
        foreign = _sparse(served, content, base_sha256=base, sha256=base)
        await served.session.refused("UploadWeights", foreign, "FAILED_PRECONDITION", "MODEL_MISMATCH")


@suite.check("Rollback", "a version that is not kept is NOT_FOUND VERSION_NOT_KEPT")
async def rollback(served: Served) -> None:
    await available(served)
    request = pb.RollbackRequest(policy=served.policy.name, policy_version=2**40)
    answer = await served.session.attempt("Rollback", request)
    allowed = (("NOT_FOUND", "VERSION_NOT_KEPT"), ("FAILED_PRECONDITION", "POLICY_FROZEN"))
    refused = isinstance(answer, Refusal) and (answer.code, answer.reason) in allowed
    demand(refused, "NOT_FOUND VERSION_NOT_KEPT, or FAILED_PRECONDITION POLICY_FROZEN", answer, request)


@suite.check("LoadModel", "a bad name of a policy is INVALID_ARGUMENT INVALID_FIELD")
async def bad_names(served: Served) -> None:
    await available(served)
    for name in ("", "../escape", ".hidden", "a b", "é", "p" * 65):
        await served.session.bad_field("LoadModel", pb.LoadModelRequest(policy=name, model="embedded"), "policy")


@suite.check("UnloadModel", "an unknown policy is NOT_FOUND UNKNOWN_POLICY")
async def unload_unknown(served: Served) -> None:
    await available(served)
    request = pb.UnloadModelRequest(policy="no-such-policy")
    await served.session.refused("UnloadModel", request, "NOT_FOUND", "UNKNOWN_POLICY")


@suite.check("ReleaseMemory", "memory that was released is taken again, and the policy goes on at its version")
async def memory(served: Served) -> None:
    served.need(policy_pb.FEATURE_MEMORY_RELEASE)
    if not served.options.writes:
        raise NotApplicable("it would stop the policy for a while: --writes")
    await available(served)
    resume = pb.ResumeMemoryRequest(policy=served.policy.name)
    served.session.later("ResumeMemory", resume)
    for _ in range(2):
        await served.session.ask("ReleaseMemory", pb.ReleaseMemoryRequest(policy=served.policy.name))
    for _ in range(2):
        await served.session.ask("ResumeMemory", resume)
    request = served.request()
    request.min_policy_version = served.policy.policy_version
    await served.generate(request)


@suite.check("UnloadModel", "the default policy stays: FAILED_PRECONDITION DEFAULT_POLICY")
async def default_stays(served: Served) -> None:
    default = (await served.session.ask("GetPolicy", policy_pb.GetPolicyRequest())).policy.name
    if served.policy.name != default:
        raise NotApplicable("it is not the default policy")
    if not served.options.writes:
        raise NotApplicable("a server that errs would lose the policy: --writes")
    await available(served)
    request = pb.UnloadModelRequest(policy=default)
    await served.session.refused("UnloadModel", request, "FAILED_PRECONDITION", "DEFAULT_POLICY")
