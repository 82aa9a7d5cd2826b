"""The seams between the services, read from the source: who imports what, and how long files and functions are.

Every checker is a function of (source, path), so that each is also shown to notice a planted violation.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath

import pytest

from tests.support.imports import modules_after
from tests.support.paths import ROOT

SERVICES = ("env", "policy", "memory", "trainer")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60

WIRE_PACKAGES = ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "buf", "protovalidate")
STUBS = tuple(f"mulligan.{name}.v1" for name in (*SERVICES, "common"))
# A service's own wire.py holds the conversions that its servicer and its client share.
WIRE_FILES = ("servicer.py", "client.py", "generate_queue.py", "start_queue.py", "wire.py", "experience_wire.py")
CLIENTS = ("client", "replicas")  # of one server, of several
WIRE_COMMON = ("status.py", "server.py", "grpc_server.py", "health.py", "validation.py", "channel.py")
TORCH_PACKAGES = ("torch", "transformers", "peft", "safetensors", "accelerate")
TORCH_FOLDERS = (
    "services/trainer",
    "services/policy/backends",
    "services/policy/huggingface",
    "services/env/encoders",
    "services/testing",
    "models",
)

# The algorithm, what it plays with, and the protocols that it takes.
_PLAYED_WITH = ("member", "player", "harness", "interfaces")
ALGORITHM = (
    *(f"services/trainer/{name}.py" for name in ("step", "batch", "evaluation", *_PLAYED_WITH)),
    *(f"services/trainer/algorithms/{path.name}" for path in (ROOT / "services/trainer/algorithms").glob("*.py")),
    *(f"services/trainer/protocols/{path.name}" for path in (ROOT / "services/trainer/protocols").glob("*.py")),
)
TRANSPORT = (*CLIENTS, "servicer", "wire", "channel", "server", "status", "validation")
PLUGINS = (
    "services/trainer/metric_writers",
    "services/policy/backends",
    "services/env/envs",
    "services/env/encoders",
    "services/memory/stores",
    "services/memory/embedders",
)
FRAMEWORK = tuple(f"services/{name}" for name in (*SERVICES, "common", "conformance"))
# Plug-ins whose names are also words of English, or of a library that others may use.
ORDINARY = ("given", "questions", "remote", "transformers", "unanswerable")

Checker = Callable[[str, PurePosixPath], list[str]]


def python_files(*folders: str) -> list[PurePosixPath]:
    """All source files below these folders, relative to the repository."""
    found = (PurePosixPath(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if not {"v1", "buf"} & set(path.parts))  # those are generated


@cache
def parsed(source: str) -> ast.Module:
    """Parsed once for all rules, which must not change it."""
    return ast.parse(source)


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    """The trees are large; the tests of other modules do without them."""
    yield
    parsed.cache_clear()


@cache
def imports(source: str, path: PurePosixPath) -> Sequence[tuple[int, str]]:
    """Line and absolute name of all that is imported, also inside functions, under TYPE_CHECKING and by name.

    `from a import b` is `a.b`, whether b is a module or not: it lies within the package `a` either way.
    """
    return list(_imported(ast.walk(parsed(source)), path))


def _imported(nodes: Iterable[ast.AST], path: PurePosixPath) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = ["mulligan", *path.parts[1:]] if path.parts[0] == "services" else [*path.parts]
            base = folders[: -node.level] if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def _last_name(function: ast.expr) -> str:
    """`import_module` of `importlib.import_module`."""
    return str(getattr(function, "attr", getattr(function, "id", "")))


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def wire_violations(source: str, path: PurePosixPath) -> list[str]:
    """Rule 1: gRPC and protobuf are known at the edge of a service alone."""
    outside = any(path.is_relative_to(f"services/{name}") for name in ("conformance", "testing"))
    at_the_edge = path.name in WIRE_FILES or outside
    if at_the_edge or (path.parent.name == "common" and path.name in WIRE_COMMON):
        return []
    return [
        f"{path}:{line} {module}" for line, module in imports(source, path) if within(module, *WIRE_PACKAGES, *STUBS)
    ]


def service_violations(source: str, path: PurePosixPath) -> list[str]:
    """Rule 2: a service reaches another through that one's client; the common code knows none of them. Where a contract
    uses messages of another, the edge uses that one's conversions, too."""
    owner = path.parts[1]
    if owner not in (*SERVICES, "common"):
        return []
    closed = [f"mulligan.{name}" for name in SERVICES if name != owner]
    open_modules = (*CLIENTS, "wire", "v1") if path.name in WIRE_FILES else CLIENTS
    clients = [] if owner == "common" else [f"{other}.{module}" for other in closed for module in open_modules]
    return [
        f"{path}:{line} {module}"
        for line, module in imports(source, path)
        if within(module, *closed) and not within(module, *clients)
    ]


def torch_violations(source: str, path: PurePosixPath) -> list[str]:
    """Rule 3: torch, and what brings it, stays with the learner, the backends that need it and the model's recipe."""
    if any(path.is_relative_to(folder) for folder in TORCH_FOLDERS):
        return []
    return [f"{path}:{line} {module}" for line, module in imports(source, path) if within(module, *TORCH_PACKAGES)]


def algorithm_violations(source: str, path: PurePosixPath) -> list[str]:
    """Rule 4: the algorithm takes protocols, and knows no transport and no service."""
    if str(path) not in ALGORITHM:
        return []
    closed = [f"mulligan.{name}" for name in SERVICES if name != "trainer"]
    return [
        f"{path}:{line} {module}"
        for line, module in imports(source, path)
        if within(module, *closed, *WIRE_PACKAGES, *TORCH_PACKAGES)
        or (within(module, "mulligan") and set(module.split(".")) & set(TRANSPORT))
    ]


@cache
def plugin_names() -> list[str]:
    """All backends, environments, encoders, stores and embedders that come along."""
    files = [path for folder in PLUGINS for path in (ROOT / folder).iterdir()]
    return sorted({path.stem for path in files if not path.name.startswith(("_", "."))})


def plugin_violations(source: str, path: PurePosixPath) -> list[str]:
    """Rule 5: no plug-in is named outside of the folders of its kind: neither imported, nor in a string or a name.
    Docstrings may mention one as an example."""
    if not any(path.is_relative_to(folder) for folder in FRAMEWORK):
        return []
    if any(path.is_relative_to(folder) for folder in PLUGINS):
        return []
    tree = parsed(source)
    packages = [f"mulligan.{folder.removeprefix('services/').replace('/', '.')}" for folder in PLUGINS]
    known = [f"{package}.{name}" for package in packages for name in plugin_names()]
    found = [f"{path}:{line} {module}" for line, module in imports(source, path) if within(module, *known)]
    docstrings = {id(document) for node in ast.walk(tree) for document in _docstring(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found += [f"{path}:{node.lineno} {node.value!r}" for _ in _named_in(node.value)]
        for text in _identifiers(node):
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
            found += [f"{path} {text}" for name in _named_in(words) if name not in ORDINARY]
    return found


@cache
def _named_in(text: str) -> list[str]:
    """The plug-ins that the text names."""
    return [name for name in plugin_names() if _names(text, name)]


def _names(text: str, plugin: str) -> bool:
    if plugin in ORDINARY:
        return text == plugin
    return re.search(rf"(?<![a-z0-9]){plugin.replace('_', '[-_ ]?')}(?![a-z0-9])", text.lower()) is not None


def _docstring(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
        first = node.body[0]
        return [first.value] if isinstance(first, ast.Expr) else []
    return []


def _identifiers(node: ast.AST) -> list[str]:
    """Names that a node has, other than those of modules that it imports."""
    names = [getattr(node, field, None) for field in ("id", "attr", "arg", "asname")]
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        names.append(node.name)
    return [name for name in names if isinstance(name, str)]


def size_violations(source: str, path: PurePosixPath) -> list[str]:
    """Files and functions short enough to be read in one go."""
    lines = len(source.splitlines())
    found = [f"{path} has {lines} lines"] if lines >= MAX_FILE_LINES else []
    waiting: list[ast.AST] = [parsed(source)]
    while waiting:
        node = waiting.pop()
        waiting += (inner for inner in ast.iter_child_nodes(node) if not isinstance(inner, ast.expr))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno} {node.name} has {length} lines")
    return found


SERVICE_FILES = python_files("services")
ALL_FILES = python_files("services", "models", "benchmarks", "tests", "examples")
ALL_FILES.append(PurePosixPath("proto/generate.py"))


def violations(checker: Checker, files: Sequence[PurePosixPath] = SERVICE_FILES) -> list[str]:
    """All that the checker finds; each names its file."""
    return [found for path in files for found in checker((ROOT / path).read_text(), path)]


def test_the_rules_look_at_the_files_that_they_are_about() -> None:
    expected = {f"services/{name}/{file}.py" for name in SERVICES for file in ("servicer", "client", "__main__")}
    expected |= {f"services/common/{file}.py" for file in ("types", "wire", "errors", "status", "server", "validation")}
    expected |= {"services/env/base.py", "services/policy/backend.py", "services/memory/store.py"}
    expected |= set(ALGORITHM)
    assert expected <= {str(path) for path in SERVICE_FILES}
    assert {"frozenlake", "reasoning_gym", "sglang", "sqlite", "transformers"} <= set(plugin_names())
    assert len(ALL_FILES) > len(SERVICE_FILES) >= len(expected)


def test_only_the_edges_know_the_wire() -> None:
    assert violations(wire_violations) == []


def test_services_meet_through_clients_alone() -> None:
    assert violations(service_violations) == []


def test_torch_stays_with_those_who_need_it() -> None:
    assert violations(torch_violations) == []


def test_the_algorithm_knows_no_transport() -> None:
    assert violations(algorithm_violations) == []


def test_a_plugin_is_named_in_its_folder_alone() -> None:
    assert violations(plugin_violations) == []


def test_files_and_functions_are_short() -> None:
    assert violations(size_violations, ALL_FILES) == []


@pytest.mark.parametrize(
    ("module", "packages"),
    [
        ("mulligan.trainer.step", ("torch", "grpc", "google.protobuf")),
        ("mulligan.env.__main__", TORCH_PACKAGES),
        ("mulligan.memory.__main__", TORCH_PACKAGES),
        ("mulligan.policy.config", (*TORCH_PACKAGES, "aiohttp", "openai")),
    ],
)
def test_importing_a_module_brings_none_of(module: str, packages: tuple[str, ...]) -> None:
    """What the source of one file cannot show: what its imports import in turn."""
    loaded = modules_after(f"import {module}")
    assert module in loaded
    assert [name for name in loaded if within(name, *packages)] == []


def test_transitive_imports_are_seen() -> None:
    loaded = modules_after("import mulligan.common.validation")
    assert any(within(name, "google.protobuf") for name in loaded)


LONG_FUNCTION = "async def f():\n" + "    pass\n" * MAX_FUNCTION_LINES


@pytest.mark.parametrize(
    ("checker", "path", "source"),
    [
        (wire_violations, "services/env/base.py", "import grpc.aio"),
        (wire_violations, "services/env/base.py", "from mulligan.env.v1 import env_service_pb2"),
        (wire_violations, "services/env/base.py", "def f():\n    from google.protobuf import message"),
        (wire_violations, "services/trainer/algorithms/erl.py", "if TYPE_CHECKING:\n    import grpc"),
        (wire_violations, "services/common/types.py", "importlib.import_module('grpc')"),
        (wire_violations, "services/common/config.py", "import protovalidate"),
        (wire_violations, "services/env/server.py", "import grpc"),
        (service_violations, "services/trainer/harness.py", "from mulligan.env.base import Environment"),
        (service_violations, "services/trainer/harness.py", "from mulligan.env import base"),
        (service_violations, "services/trainer/harness.py", "import mulligan.policy"),
        (service_violations, "services/trainer/harness.py", "from ..memory import store"),
        (service_violations, "services/policy/backends/tiny.py", "from ...trainer.losses import grpo"),
        (service_violations, "services/trainer/harness.py", "from mulligan.policy.wire import canary_to_proto"),
        (service_violations, "services/common/wire.py", "from mulligan.policy.v1 import policy_service_pb2"),
        (service_violations, "services/common/types.py", "from mulligan.env.client import EnvClient"),
        (torch_violations, "services/env/envs/sokoban.py", "import torch.nn as nn"),
        (torch_violations, "services/policy/servicer.py", "from transformers import AutoTokenizer"),
        (algorithm_violations, "services/trainer/step.py", "from mulligan.env.client import EnvClient"),
        (algorithm_violations, "services/trainer/harness.py", "import mulligan.policy"),
        (
            algorithm_violations,
            "services/trainer/algorithms/erl.py",
            "from mulligan.trainer.learner.client import Remote",
        ),
        (algorithm_violations, "services/trainer/interfaces.py", "from mulligan.common.channel import Endpoint"),
        (algorithm_violations, "services/trainer/algorithms/erl.py", "import grpc"),
        (algorithm_violations, "services/trainer/algorithms/erl.py", "def f():\n    import torch"),
        (plugin_violations, "services/policy/config.py", "from mulligan.policy.backends.sglang import Settings"),
        (plugin_violations, "services/policy/config.py", "from .backends import openai"),
        (plugin_violations, "services/policy/config.py", "backend: Literal['sglang']"),
        (plugin_violations, "services/policy/config.py", "class SglangSettings: pass"),
        (plugin_violations, "services/policy/policies.py", "servers = settings.sglang"),
        (plugin_violations, "services/policy/policies.py", "message = f'sglang.servers: {address} is taken'"),
        (plugin_violations, "services/policy/config.py", "default = 'transformers'"),
        (plugin_violations, "services/memory/config.py", "database = 'sqlite:memory.db'"),
        (plugin_violations, "services/memory/vectors.py", "from mulligan.memory.embedders import wordllama"),
        (plugin_violations, "services/memory/config.py", "embedder = 'given'"),
        (plugin_violations, "services/env/config.py", "def f(reasoning_gym): pass"),
        (plugin_violations, "services/env/load.py", "importlib.import_module('mulligan.env.envs.remote')"),
        (plugin_violations, "services/trainer/run.py", "message = 'HotpotQA has a setting for it'"),
        (plugin_violations, "services/conformance/local.py", "KIND = 'frozenlake-3x3'"),
        (size_violations, "services/env/base.py", "x = 1\n" * MAX_FILE_LINES),
        (size_violations, "services/env/base.py", LONG_FUNCTION),
    ],
)
def test_a_planted_violation_is_found(checker: Checker, path: str, source: str) -> None:
    assert len(checker(source, PurePosixPath(path))) == 1


@pytest.mark.parametrize(
    ("checker", "path", "source"),
    [
        (wire_violations, "services/env/servicer.py", "import grpc"),
        (wire_violations, "services/common/wire.py", "from mulligan.common.v1 import message_pb2"),
        (wire_violations, "services/conformance/env.py", "import grpc"),
        (wire_violations, "services/env/base.py", "import grpcish\nfrom mulligan.env.client import EnvClient"),
        (service_violations, "services/trainer/__main__.py", "from mulligan.env.client import EnvClient"),
        (service_violations, "services/trainer/__main__.py", "from mulligan.env import client"),
        (service_violations, "services/trainer/wire.py", "from mulligan.policy.wire import canary_to_proto"),
        (service_violations, "services/trainer/__main__.py", "from mulligan.policy.replicas import connect"),
        (service_violations, "services/trainer/harness.py", "from .advantages import grpo\nfrom ..common import types"),
        (service_violations, "services/cli/demo.py", "from mulligan.env.servicer import EnvServicer"),
        (torch_violations, "services/policy/backends/local.py", "import torch"),
        (torch_violations, "services/trainer/losses.py", "import torch"),
        (algorithm_violations, "services/trainer/run.py", "from mulligan.env.client import EnvClient"),
        (
            algorithm_violations,
            "services/trainer/algorithms/erl.py",
            "from mulligan.trainer.interfaces import LearnerPort",
        ),
        (plugin_violations, "services/policy/config.py", "from mulligan.policy.backends import BACKENDS"),
        (plugin_violations, "services/policy/config.py", '"""Such as sglang."""'),
        (plugin_violations, "services/policy/huggingface/tokenizer.py", "from transformers import AutoTokenizer"),
        (plugin_violations, "services/policy/backends/sglang/server.py", "NAME = 'sglang'"),
        (plugin_violations, "services/env/client.py", "class RemoteEpisode: pass"),
        (plugin_violations, "services/cli/demo.py", "RECIPE = 'frozenlake-3x3'"),
        (size_violations, "services/env/base.py", "x = 1\n" * (MAX_FILE_LINES - 1)),
    ],
)
def test_what_the_rules_allow_is_allowed(checker: Checker, path: str, source: str) -> None:
    assert checker(source, PurePosixPath(path)) == []


def printing_violations(source: str, path: PurePosixPath) -> list[str]:
    """Commands reach the terminal through `out.py` alone, where data are neither markup nor escape sequences."""
    if path.name in ("out.py", "__main__.py", "my_game.py"):  # without typer and rich the command can only print
        return []
    found = [f"{path}:{line} {module}" for line, module in imports(source, path) if within(module, "rich.console")]
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            says = name in ("sys.exit", "exit") and node.args and not isinstance(node.args[0], ast.Constant | ast.IfExp)
            if name in ("print", "Console", "typer.echo", "sys.stdout.write") or says:
                found.append(f"{path}:{node.lineno} {name}")
    return found


def test_commands_print_in_one_way() -> None:
    assert violations(printing_violations, python_files("services/cli")) == []


@pytest.mark.parametrize(
    "planted",
    ["print(text)", "from rich.console import Console", "Console().print(text)", "sys.exit(f'error: {text}')"],
)
def test_another_way_to_print_is_noticed(planted: str) -> None:
    assert printing_violations(planted, PurePosixPath("services/cli/new.py"))


def circle(sources: Mapping[PurePosixPath, str]) -> list[str]:
    """Modules of `mulligan` that import each other in a circle, [] if there are none. Imports within functions do not
    count, those under TYPE_CHECKING do."""
    modules = {
        path: ".".join(["mulligan", *path.with_suffix("").parts[1:]]).removesuffix(".__init__") for path in sources
    }
    known = set(modules.values())
    graph = {}
    for path, source in sources.items():
        imported = _imported(_outside_functions(parsed(source)), path)
        found = {name if name in known else name.rpartition(".")[0] for _, name in imported}
        graph[modules[path]] = found & known
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _outside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes but those in the bodies of functions."""
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        yield node
        body = node.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else []
        left += [child for child in ast.iter_child_nodes(node) if child not in body]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle({path: (ROOT / path).read_text() for path in SERVICE_FILES}) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("from mulligan.policy.deployment import Deployment", True),
        ("from mulligan.policy import deployment", True),
        ("from .deployment import Deployment", True),
        ("if TYPE_CHECKING:\n    import mulligan.policy.deployment", True),
        ("def f():\n    from mulligan.policy.deployment import Deployment", False),
        ("from mulligan.policy.backend import Backend", False),
    ],
)
def test_a_circle_is_noticed(planted: str, found: bool) -> None:
    sources = {
        "services/policy/__init__.py": "",
        "services/policy/backend.py": "",
        "services/policy/deployment.py": "from mulligan.policy import loading",
        "services/policy/loading.py": "from mulligan.policy.metrics import TOKENS",
        "services/policy/metrics.py": planted,
    }
    assert bool(circle({PurePosixPath(path): source for path, source in sources.items()})) is found


# By classes, which plug-ins bring along.
MAY_GROW = {"services/trainer/objective.py: _INPUTS"}
_GROWING = ("dict", "set", "list", "defaultdict", "OrderedDict")


def growing(source: str, path: PurePosixPath) -> list[str]:
    """Containers of a module that are empty at first: what is put there stays for ever, unless something takes it out.
    Names of callers have no place there."""
    found = []
    for node in parsed(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        value = node.value
        is_empty = isinstance(value, ast.Dict | ast.List) and not ast.unparse(value).strip("[]{}")
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in _GROWING:
            is_empty = not value.args or value.func.id == "defaultdict"
        if is_empty:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            found.append(f"{path}: {ast.unparse(target)}")
    return found


def test_no_module_keeps_what_callers_name() -> None:
    found = [one for path in python_files("services") for one in growing((ROOT / path).read_text(), path)]
    assert set(found) == MAY_GROW


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("_LOCKS: defaultdict[str, Lock] = defaultdict(Lock)", True),
        ("_SEEN: set[str] = set()", True),
        ("_SEEN = {}", True),
        ("_SEEN = []", True),
        ("_LOCKS: WeakValueDictionary[str, Lock] = WeakValueDictionary()", False),
        ("_NAMES = {1: 'one'}", False),
        ("_NAMES = set(NAMES)", False),
        ("def f():\n    seen = {}", False),
    ],
)
def test_a_container_that_grows_is_noticed(planted: str, found: bool) -> None:
    assert bool(growing(planted, PurePosixPath("services/env/a.py"))) is found


# Every plug-in exports its settings under this name.
SHARED_NAMES = {"Settings"}


def ambiguous_names(sources: Mapping[PurePosixPath, str]) -> dict[str, list[str]]:
    """Public classes that more than one of these modules defines: name → places."""
    places: dict[str, list[str]] = {}
    for path, source in sources.items():
        for node in parsed(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name not in SHARED_NAMES:
                places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    return {name: found for name, found in places.items() if len(found) > 1}


def test_a_class_name_has_one_meaning() -> None:
    assert ambiguous_names({path: (ROOT / path).read_text() for path in python_files("services")}) == {}


def test_a_name_with_two_meanings_is_noticed() -> None:
    classes = "class Limits: ...\nclass _Limits: ...\nclass Settings: ...\n"
    sources = {PurePosixPath("services/env/a.py"): classes, PurePosixPath("services/policy/b.py"): "\n" + classes}
    assert ambiguous_names(sources) == {"Limits": ["services/env/a.py:1", "services/policy/b.py:2"]}


def misplaced(test: PurePosixPath) -> bool:
    """Whether its folder is none of `services/`, nor, as `benchmarks`, one of the repository."""
    suite, folder = test.parts[1], PurePosixPath(*test.parts[2:-1])
    if folder == PurePosixPath():
        return suite == "contract"  # the unit tests there are of the repository as a whole
    return not any((ROOT / base / folder).is_dir() for base in ("services", ""))


def test_tests_lie_in_the_folders_of_what_they_test() -> None:
    files = [path for path in python_files("tests/unit", "tests/contract") if path.name.startswith("test_")]
    assert len(files) > 100 and [path for path in files if misplaced(path)] == []


@pytest.mark.parametrize(
    "planted", ["contract/test_env.py", "contract/envs/test_lake.py", "unit/policy/sglang/test_a.py"]
)
def test_a_misplaced_test_is_noticed(planted: str) -> None:
    assert misplaced(PurePosixPath("tests", planted))
