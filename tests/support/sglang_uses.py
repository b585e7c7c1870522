"""Finds what our code uses of SGLang: attributes, keywords, imports and overridden methods.

A small reader of annotations, not a type checker. It follows SGLang's objects from where they come in
(annotated parameters, base classes, constructors) through attributes, calls, loops and assignments.
What it cannot follow it calls unknown, and then the attribute's bare name has to be known to somebody.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Types of attributes and of what methods return, as far as our code goes on from there. A list of T is
# "[T]".
PARTS = {
    ("Allocator", "get_kvcache"): "MHATokenToKVPool",
    ("CudaGraphConfig", "decode"): "PhaseConfig",
    ("CudaGraphConfig", "prefill"): "PhaseConfig",
    ("ForwardBatch", "forward_mode"): "ForwardMode",
    ("GetInternalStateReqOutput", "internal_state"): "dict",
    ("MatchPrefixParams", "key"): "RadixKey",
    ("MatchPrefixParams", "req"): "Req",
    ("ModelConfig", "attention_arch"): "AttentionArch",
    ("ModelRunner", "req_to_token_pool"): "ReqToTokenPool",
    ("ModelRunner", "server_args"): "ServerArgs",
    ("PrefillAdder", "_select_prefill_admission"): "_PrefillAdmission",
    ("PrefillAdder", "running_batch"): "ScheduleBatch",
    ("MultimodalInputs", "mm_items"): "[MultimodalDataItem]",
    ("Req", "finished_reason"): "BaseFinishReason",
    ("Req", "kv"): "ReqKvInfo",
    ("Req", "multimodal_inputs"): "MultimodalInputs",
    ("Req", "sampling_params"): "SamplingParams",
    ("ScheduleBatch", "decoding_reqs"): "[Req]",
    ("ScheduleBatch", "forward_mode"): "ForwardMode",
    ("ScheduleBatch", "req_to_token_pool"): "ReqToTokenPool",
    ("ScheduleBatch", "reqs"): "[Req]",
    ("Scheduler", "attn_tp_group"): "GroupCoordinator",
    ("DecodePreallocQueue", "queue"): "[DecodeRequest]",
    ("DecodeRequest", "req"): "Req",
    ("Scheduler", "disagg_decode_prealloc_queue"): "DecodePreallocQueue",
    ("Scheduler", "last_batch"): "ScheduleBatch",
    ("Scheduler", "metrics_collector_context"): "SchedulerMetricsCollectorContext",
    ("Scheduler", "model_config"): "ModelConfig",
    ("Scheduler", "new_token_ratio_tracker"): "NewTokenRatioTracker",
    ("Scheduler", "req_to_token_pool"): "ReqToTokenPool",
    ("Scheduler", "running_batch"): "ScheduleBatch",
    ("Scheduler", "server_args"): "ServerArgs",
    ("Scheduler", "token_to_kv_pool_allocator"): "Allocator",
    ("Scheduler", "tp_worker"): "TpModelWorker",
    ("Scheduler", "tree_cache"): "UnifiedRadixCache",
    ("Scheduler", "waiting_queue"): "[Req]",
    ("SchedulerMetricsCollectorContext", "collector"): "SchedulerMetricsCollector",
    ("TokenizerManager", "model_config"): "ModelConfig",
    ("SWAKVPool", "full_kv_pool"): "MHATokenToKVPool",
    ("ServerArgs", "cuda_graph_config"): "CudaGraphConfig",
    ("UnifiedRadixCache", "cache_controller"): "HiCacheController",
    ("UnifiedRadixCache", "match_prefix"): "MatchResult",
    ("UnifiedRadixCache", "tree_core"): "UnifiedTreeCoreInterface",
    ("model_override_base", "model_config_of"): "ModelConfig",
    ("overrides", "resolving_view"): "ServerArgs",
}

# Names that no annotation tells of: of parameters that SGLang's types would only burden, of lambdas,
# and of what a function of SGLang hands over as ``type``.
KNOWN_NAMES = {
    ("flags.py", "record"): "ServerArgs",
    ("doctor.py", "model"): "ModelConfig",
    ("attention_backends.py", "resolved"): "ServerArgs",
    ("doctor.py", "resolved"): "ServerArgs",
    ("report.py", "result"): "GetInternalStateReqOutput",
    ("refusals.py", "c"): "ServerArgs",
    ("refusals.py", "layer"): "RadixAttention",
    ("refusals.py", "model"): "ModelConfig",
    ("refusals.py", "resolved"): "ServerArgs",
    ("rotary.py", "layer"): "RadixAttention",
    ("rotary.py", "rotary"): "RotaryEmbedding",
    ("runtime.py", "first"): "RadixAttention",
    ("runtime.py", "layer"): "RadixAttention",
    ("runtime.py", "layers"): "[RadixAttention]",
    ("report.py", "base"): "SchedulerOutputStreamer",
    ("window_pool.py", "allocator"): "Allocator",
    ("window_pool.py", "model"): "ModelConfig",
    ("window_pool.py", "pool"): "SWAKVPool",
    ("window_pool.py", "resolved"): "ServerArgs",
    ("requests.py", "manager"): "TokenizerManager",
    ("requests.py", "obj"): "GenerateReqInput",
}
KNOWN_BASES = {
    "CompressedPrefillAdder": "PrefillAdder",
    "ReportingOutputStreamer": "SchedulerOutputStreamer",
}


@dataclass(frozen=True, order=True)
class Use:
    """One use: ``owner`` is a class or module of SGLang, "" where the reader does not know it."""

    owner: str
    name: str
    place: str
    keyword: str = ""


@dataclass
class Ours:
    """Classes of ours and what is known of them, over all files."""

    attributes: dict[str, dict[str, str]] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    methods: dict[str, set[str]] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    returns: dict[str, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)


def type_of(annotation: ast.expr | None) -> str:
    """``X`` of ``X``, ``X | None``, ``"X"``; ``[X]`` of a list; "" of anything else."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.Name):
        return annotation.id
    if isinstance(annotation, ast.BinOp):
        return type_of(annotation.left)
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inner = type_of(annotation.slice)
        return f"[{inner}]" if annotation.value.id in ("list", "Sequence", "Iterable") and inner else ""
    return ""


def collect(paths: list[Path]) -> Ours:
    """What our own classes and functions say of themselves."""
    ours = Ours()
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                ours.names.add(node.name)
                ours.returns.setdefault(node.name, type_of(node.returns))
            elif isinstance(node, ast.ClassDef):
                _collect_class(ours, node)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    ours.names.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                ours.names |= {target.id for target in targets if isinstance(target, ast.Name)}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                made = node.value.func
                if isinstance(made, ast.Name) and isinstance(node.targets[0], ast.Name):
                    ours.variables[node.targets[0].id] = made.id
    return ours


def _collect_class(ours: Ours, node: ast.ClassDef) -> None:
    known = ours.attributes.setdefault(node.name, {})
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    ours.bases[node.name] = KNOWN_BASES.get(node.name, bases[0] if bases else "")
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    ours.names.add(node.name)
    ours.methods[node.name] = {method.name for method in methods}
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            known[part.target.id] = type_of(part.annotation)
    for method in methods:
        if method.decorator_list:
            known[method.name] = type_of(method.returns)
        given = {a.arg: type_of(a.annotation) for a in method.args.args}
        for inner in ast.walk(method):
            target, value = _set_on_self(inner)
            if target is not None:
                annotated = type_of(inner.annotation) if isinstance(inner, ast.AnnAssign) else ""
                value_type = given.get(value.id, "") if isinstance(value, ast.Name) else ""
                known[target] = annotated or value_type or known.get(target, "")


def _set_on_self(node: ast.AST) -> tuple[str | None, ast.expr | None]:
    target = None
    if isinstance(node, ast.AnnAssign):
        target = node.target
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    on_self = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    return (target.attr, node.value) if on_self else (None, None)


class Reader:
    """Reads one file.

    Parameters
    ----------
    path : Path
    ours : Ours
    sglang_types : set of str
        Names of SGLang's classes and modules that uses are reported of.
    """

    def __init__(self, path: Path, ours: Ours, sglang_types: set[str]) -> None:
        self.file, self.ours, self.types = path.name, ours, sglang_types
        self.tree = ast.parse(path.read_text())
        self.foreign: set[str] = set()  # names of other packages' modules and objects
        self.imported: dict[str, str] = {}  # name -> SGLang module, or class, that it stands for
        self.uses: list[Use] = []

    def read(self) -> list[Use]:
        self._imports()
        self._scope(self.tree, {}, "")
        return self.uses

    def _imports(self) -> None:
        hidden = {
            inner
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                self.foreign |= {(a.asname or a.name).partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                for alias in node.names:
                    name = alias.asname or alias.name
                    if not module.startswith("sglang."):
                        if not module.startswith("kara_sglang") or alias.name.islower():
                            self.foreign.add(name)
                        continue
                    self.imported[name] = (
                        f"{module.removeprefix('sglang.srt').lstrip('.')}:{alias.name}"
                    )
                    if node not in hidden:
                        owner = module.removeprefix("sglang.srt").lstrip(".")
                        self._use(owner, alias.name, node)
        self.foreign -= set(self.ours.variables)

    def _use(self, owner: str, name: str, node: ast.AST, keyword: str = "") -> None:
        self.uses.append(Use(owner, name, f"{self.file}:{node.lineno}", keyword))

    # -- scopes --------------------------------------------------------------------------------------

    def _scope(self, node: ast.AST, outer: dict[str, str], owner: str) -> None:
        """A module, class or function: its names first, then what it uses."""
        names = dict(outer)
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            args = node.args
            for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs):
                kind = KNOWN_NAMES.get((self.file, arg.arg)) or type_of(arg.annotation)
                names[arg.arg] = owner if arg.arg == "self" and owner else kind
        inner = list(_own_nodes(node))
        for _ in range(2):  # a name may come from one that is bound further down
            for part in inner:
                self._bind(part, names)
        for part in inner:
            if isinstance(part, ast.FunctionDef | ast.Lambda | ast.ClassDef):
                self._scope(part, names, part.name if isinstance(part, ast.ClassDef) else owner)
            self._look(part, names, owner)
        if isinstance(node, ast.ClassDef) and self._base(node.name) in self.types:
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    self._use(self._base(node.name), part.name, part, keyword="def")
                elif isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name):
                    self._use(self._base(node.name), part.targets[0].id, part, keyword="def")

    def _bind(self, part: ast.AST, names: dict[str, str]) -> None:
        if isinstance(part, ast.Assign) and len(part.targets) == 1:
            self._bind_to(part.targets[0], part.value, names)
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            names[part.target.id] = type_of(part.annotation)
        elif isinstance(part, ast.NamedExpr):
            self._bind_to(part.target, part.value, names)
        elif isinstance(part, ast.For | ast.comprehension):
            self._bind_element(part.target, part.iter, names)

    def _bind_to(self, target: ast.expr, value: ast.expr, names: dict[str, str]) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._bind_to(one, its, names)
        elif isinstance(target, ast.Name):
            known = KNOWN_NAMES.get((self.file, target.id))
            names[target.id] = known or self._infer(value, names) or names.get(target.id, "")

    def _bind_element(self, target: ast.expr, iterable: ast.expr, names: dict[str, str]) -> None:
        if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name | ast.Attribute):
            called = ast.unparse(iterable.func)
            if called == "enumerate" and isinstance(target, ast.Tuple):
                target, iterable = target.elts[1], iterable.args[0]
            elif called.endswith("islice"):
                iterable = iterable.args[0]
        kind = self._infer(iterable, names)
        if isinstance(target, ast.Name):
            known = KNOWN_NAMES.get((self.file, target.id))
            names[target.id] = known or kind.strip("[]") if kind.startswith("[") or known else ""

    # -- types -----------------------------------------------------------------------------------------

    def _base(self, name: str) -> str:
        return self.ours.bases.get(name, "")

    def _infer(self, node: ast.expr | None, names: dict[str, str]) -> str:
        if isinstance(node, ast.Name):
            if node.id in names:
                return names[node.id]
            if node.id in self.imported:
                return self._class_of_import(node.id)
            return self.ours.variables.get(node.id, "")
        if isinstance(node, ast.Attribute):
            return self._part(self._infer(node.value, names), node.attr)
        if isinstance(node, ast.Subscript):
            kind = self._infer(node.value, names)
            return kind.strip("[]") if kind.startswith("[") else ""
        if isinstance(node, ast.IfExp | ast.BoolOp):
            parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else node.values
            return next((kind for part in parts if (kind := self._infer(part, names))), "")
        if isinstance(node, ast.Call):
            return self._returned(node, names)
        return ""

    def _returned(self, node: ast.Call, names: dict[str, str]) -> str:
        function = node.func
        if isinstance(function, ast.Name):
            if function.id == "super":
                return self._base(names.get("self", ""))
            if function.id in self.imported:
                module, _, name = self.imported[function.id].partition(":")
                return PARTS.get((module.rpartition(".")[2], name), name)
            if function.id in self.ours.attributes:
                return function.id
            return self.ours.returns.get(function.id, "")
        if isinstance(function, ast.Attribute):
            owner = self._infer(function.value, names)
            if function.attr == "_replace":
                return owner
            kind = self._part(owner, function.attr)
            return kind or ("" if owner in self.types else self.ours.returns.get(function.attr, ""))
        return ""

    def _class_of_import(self, name: str) -> str:
        return "Envs" if name == "envs" else self.imported[name].partition(":")[2]

    def _part(self, owner: str, name: str) -> str:
        if owner == "Envs":
            return "EnvField"
        while owner:
            if name in self.ours.attributes.get(owner, {}):
                return self.ours.attributes[owner][name]
            if (owner, name) in PARTS:
                return PARTS[owner, name]
            owner = self._base(owner)
        return ""

    # -- uses ------------------------------------------------------------------------------------------

    def _look(self, part: ast.AST, names: dict[str, str], owner: str) -> None:
        if isinstance(part, ast.Attribute):
            self._attribute(part, names)
        elif isinstance(part, ast.Call):
            self._call(part, names)

    def _attribute(self, node: ast.Attribute, names: dict[str, str]) -> None:
        root = node.value
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in self.foreign and root.id not in names:
            return
        kind = self._infer(node.value, names)
        if kind in self.ours.attributes:
            base = self._base(kind)
            mine = self.ours.attributes[kind].keys() | self.ours.methods[kind]
            if base not in self.types or node.attr in mine:
                return
            kind = base
        if isinstance(node.value, ast.Name) and node.value.id in self.imported and not kind:
            kind = self.imported[node.value.id].replace(":", ".")
        self._use(kind if kind in self.types else "", node.attr, node)

    def _call(self, node: ast.Call, names: dict[str, str]) -> None:
        given = [keyword.arg for keyword in node.keywords if keyword.arg]
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("getattr", "setattr", "hasattr"):
            kind, name = self._infer(node.args[0], names), node.args[1]
            if kind not in self.ours.attributes and isinstance(name, ast.Constant):
                self._use(kind if kind in self.types else "", name.value, node)
        elif isinstance(function, ast.Name) and function.id in self.imported:
            module, _, name = self.imported[function.id].partition(":")
            for keyword in given:
                if name in self.types:
                    self._use(name, "__init__", node, keyword)
                else:
                    self._use(module, name, node, keyword)
        elif isinstance(function, ast.Attribute):
            if ast.unparse(function) == "dataclasses.replace":
                kind = self._infer(node.args[0], names)
                if kind in self.types:
                    for keyword in given:
                        self._use(kind, keyword, node)
                return
            kind = self._infer(function.value, names)
            if kind in self.ours.attributes and function.attr not in self.ours.methods[kind]:
                kind = self._base(kind)
            if kind in self.types:
                for keyword in given:
                    if function.attr == "_replace":
                        self._use(kind, keyword, node)
                    else:
                        self._use(kind, function.attr, node, keyword)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a scope but those in scopes inside it, which come once, as a whole."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield from _own_nodes(child)
        elif isinstance(child, ast.FunctionDef | ast.ClassDef):
            for decorator in child.decorator_list:
                yield decorator
                yield from _own_nodes(decorator)
