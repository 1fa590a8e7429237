"""`lmtrain models`: the models that are kept, as numbered versions of a name, in a folder or an MLflow registry.

  lmtrain models save RUN --name NAME [--checkpoint C] [--weights-only]   as the next version: 1, 2, ...
  lmtrain models save RUN --name NAME --register [--alias champion]       ... and in the MLflow registry as well
  lmtrain models list [NAME] [--json]                                     all models, or the versions of one
  lmtrain models show ID [--json]                                         what is known of one
  lmtrain models verify [ID ...]                                          whether every file is as it was saved
  lmtrain models delete ID [--yes]                                        asks first

ID is NAME, its newest version, or NAME:VERSION; in a registry also NAME@ALIAS. generate, evaluate, export, data inspect
and init_from= take it too. The store is the folder or registry of --store, else of $LMTRAIN_MODELS, else `models`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lmtrain.commands import CommandParser, run_verb
from lmtrain.config.schema.rules import require
from lmtrain.errors import ConfigError, ModelStoreError
from lmtrain.store import find_run, open_store
from lmtrain.store.entry import StoredModel
from lmtrain.store.naming import REGISTRY, is_registry, parse_id, require_alias, require_name, store_word
from lmtrain.store.opening import open_registry
from lmtrain.sweep.terminal import output

if TYPE_CHECKING:
    from lmtrain.store.registry import RegistryStore

UNITS = ("B", "kB", "MB", "GB", "TB")


def main(arguments: list[str]) -> int:
    """Run one of the verbs; exit status 0. Raises LmtrainError for what cannot be done."""
    verbs = {"save": save, "list": list_models, "show": show, "verify": verify, "delete": delete}
    return run_verb("models", __doc__, verbs, arguments)


def save(arguments: list[str]) -> None:
    """Add the model of a run to the store and say under which number."""
    parser = _parser("save", "Keep the model of a run as the next version of a name.")
    parser.add_argument("run", metavar="RUN", help="a run folder, or a model of the store")
    parser.add_argument("--name", required=True, metavar="NAME", help="letters, digits, '.', '_' and '-'")
    chosen = "last, best or a step (default: the best, else the newest)"
    parser.add_argument("--checkpoint", metavar="C", help=chosen)
    parser.add_argument("--weights-only", action="store_true", help="without what only training needs")
    parser.add_argument("--register", action="store_true", help="in the MLflow registry as well")
    parser.add_argument("--alias", metavar="A", help="in a registry: let NAME@A be this version, such as champion")
    options = parser.parse_args(arguments)
    require_name(options.name)
    registry = _registry_of(options)
    run = find_run(options.run, options.store).folder
    store = registry if registry is not None and not options.register else open_store(options.store)
    metadata = store.save(run, options.name, checkpoint=options.checkpoint, weights_only=options.weights_only)
    size = f"{metadata['parameters']:,} parameters, {_size(metadata['bytes'])}"
    print(f"{metadata['id']}: step {metadata['step']:,}, {size}, in {store}")
    id = parse_id(metadata["id"])
    if registry is None:
        return
    if options.register:
        id = registry.register(store.path_of(id), options.name, run)
        print(f"registered as {id} in {registry}")
    if options.alias is not None:
        registry.set_alias(id, options.alias)
        print(f"{id.name}@{options.alias} is {id}")


def _registry_of(options: argparse.Namespace) -> RegistryStore | None:
    """The registry that a model is to be in, which must answer. Raises LmtrainError."""
    is_store = is_registry(store_word(options.store))
    require(not (is_store and options.register), "--register is for folders: this store is a registry itself")
    if not is_store and not options.register:
        require(options.alias is None, "--alias is for a registry: add --register, or --store mlflow")
        return None
    if options.alias is not None:
        require_alias(options.alias)
    from lmtrain.inference.serving import write_mlflow_model

    registry = open_registry(store_word(options.store) if is_store else REGISTRY, write_mlflow_model)
    registry.require_usable()
    return registry


def list_models(arguments: list[str]) -> None:
    """Print a line for each model."""
    parser = _parser("list", "The models of a store, or the versions of one.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="only this model's versions")
    parser.add_argument("--json", action="store_true", help="print a JSON list of objects")
    options = parser.parse_intermixed_args(arguments)
    if options.name is not None:
        require_name(options.name)
    store = open_store(options.store)
    models = store.models(options.name)
    if options.json:
        print(json.dumps([asdict(model) for model in models], indent=2, ensure_ascii=False))
    elif models:
        output().print(_table(models))
    else:
        print(f"no models in {store}; lmtrain models save RUN --name NAME keeps one")


def show(arguments: list[str]) -> None:
    """Print the metadata of a model."""
    parser = _parser("show", "What is known of a model.")
    parser.add_argument("id", metavar="ID", help="NAME, its newest version, or NAME:VERSION")
    parser.add_argument("--json", action="store_true", help="print model.json")
    options = parser.parse_intermixed_args(arguments)
    id = parse_id(options.id)
    metadata = open_store(options.store).show(id)
    if options.json:
        print(json.dumps(metadata, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_sheet(metadata)))


def verify(arguments: list[str]) -> None:
    """Check every file of models. Raises ModelStoreError if one is not as it was saved."""
    parser = _parser("verify", "Whether the files of models are as they were saved: all of every file is read.")
    parser.add_argument("ids", nargs="*", metavar="ID", help="default: all models")
    options = parser.parse_intermixed_args(arguments)
    ids = [parse_id(word) for word in options.ids]
    store = open_store(options.store)
    ids = [store.resolve(id) for id in ids] if ids else [parse_id(model.id) for model in store.models()]
    damaged = []
    for id in ids:
        problems = store.verify(id)
        print(f"{id}  {'as it was saved' if not problems else 'NOT as it was saved'}")
        for problem in problems:
            print(f"  {problem}")
        damaged += [str(id)] * bool(problems)
    if damaged:
        raise ModelStoreError(f"{len(damaged)} of {len(ids)} models not as saved: {', '.join(damaged)}")
    if not ids:
        print(f"no models in {store}")


def delete(arguments: list[str]) -> None:
    """Remove a model, after asking."""
    parser = _parser("delete", "Remove one version of a model.")
    parser.add_argument("id", metavar="ID", help="NAME, its newest version, or NAME:VERSION")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_intermixed_args(arguments)
    id = parse_id(options.id)
    store = open_store(options.store)
    id = store.resolve(id)
    if options.yes or _confirmed(f"delete {id} from {store}"):
        store.delete(id)
        print(f"deleted {id} from {store}")


def _confirmed(what: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("models delete asks before it deletes, and there is no terminal; add --yes")
    return input(f"{what}? [y/N] ").strip().lower() in ("y", "yes")


def _parser(verb: str, description: str) -> CommandParser:
    parser = CommandParser(f"models {verb}", description)
    where = "a folder, mlflow, or the address of an MLflow registry (default: $LMTRAIN_MODELS, else models)"
    parser.add_argument("--store", metavar="S", help=where)
    return parser


# ------------------------------------------------------------------------------------------- tables


def _table(models: list[StoredModel]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("name", "version", "parameters", "size", "objective", "data", "saved"):
        right = heading in ("version", "parameters", "size")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for model in models:
        version = f"{model.version}{''.join(f' @{alias}' for alias in model.aliases)}"
        if model.problem is not None:
            table.add_row(model.name, version, "", "", "", escape(model.problem), "", style="red")
            continue
        table.add_row(
            model.name,
            version,
            _count(model.parameters),
            "" if model.bytes is None else _size(model.bytes),
            "" if model.objective is None else f"{model.objective_name} {model.objective:.4f}",
            escape(model.data or ""),
            _local_time(model.created),
        )
    return table


def _sheet(metadata: Mapping[str, Any]) -> list[str]:
    """Names and values, a line each; those of nested ones by dotted name."""
    lines: dict[str, str] = {}
    for key, value in metadata.items():
        if key == "files":
            lines |= {name: f"{_size(file['bytes'])}, sha256 {file['sha256']}" for name, file in value.items()}
        elif isinstance(value, Mapping):
            lines |= {f"{key}.{name}": _word(inner) for name, inner in value.items()}
        else:
            lines[key] = _size(value) if key == "bytes" else _word(value)
    width = max(map(len, lines))
    return [f"{name:<{width}}  {value}" for name, value in lines.items()]


def _word(value: object) -> str:
    """As the config writes it, numbers with commas."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "-"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _size(num_bytes: float) -> str:
    for unit in UNITS:
        if num_bytes < 1000 or unit == UNITS[-1]:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def _local_time(created: str | None) -> str:
    return "" if created is None else f"{datetime.fromisoformat(created).astimezone():%Y-%m-%d %H:%M}"
