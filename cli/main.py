"""`embedkit`: the commands, and the one place where an error becomes three lines and a code."""

from __future__ import annotations

import copy
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from embedkit import __version__
from embedkit.cli.atlas import atlas
from embedkit.cli.bench import bench
from embedkit.cli.check import check
from embedkit.cli.cluster import cluster
from embedkit.cli.compare import compare
from embedkit.cli.data import data
from embedkit.cli.dedupe import dedupe
from embedkit.cli.demo import demo
from embedkit.cli.display import show_error
from embedkit.cli.doctor import doctor
from embedkit.cli.embed import embed
from embedkit.cli.eval import eval
from embedkit.cli.export import export
from embedkit.cli.index_group import index_group
from embedkit.cli.info import info
from embedkit.cli.list import list_
from embedkit.cli.search import search
from embedkit.cli.serve import serve
from embedkit.cli.train import train
from embedkit.cli.verify import verify
from embedkit.errors import EmbedKitError, Interrupted, MissingExtraError, UsageError

__all__ = ["app", "main"]

_START = """\
embedkit: find the ones like this, in your own photos

  embedkit train ./photos --loss rll              a folder per class -> a model
  embedkit export --trt                           -> ONNX and a TensorRT engine, proven equal
  embedkit index ./catalog                        -> catalog.faiss
  embedkit search ./query.jpg --index catalog.faiss

  embedkit demo       all of it on generated pictures, in two minutes
  embedkit --help     all commands
"""


class _Commands(TyperGroup):
    """The list of commands is printed plain: importing rich would triple the time to it."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def list_commands(self, ctx: Any) -> list[str]:
        """Typer names groups first; `index` belongs where the work has it."""
        names = [name for name in super().list_commands(ctx) if name != "index"]
        names.insert(names.index("search"), "index")
        return names


# What only the heavy half needs; a light installation does well without.
_TRAINING = (
    *("torch", "torchvision", "onnx", "onnxscript", "safetensors"),
    *("imagehash", "optuna", "scipy", "sklearn"),
)
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "faiss-cpu", "tensorrt", "tensorrt-rtx", "torch")

app = typer.Typer(
    name="embedkit",
    cls=_Commands,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Train an image embedding on your photos, export it proven equal, "
    "search it without PyTorch.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or data, 3 some inputs skipped, "
    "4 a quality gate failed, 5 artefacts do not belong together, "
    "6 device or package missing, 130 interrupted.",
)
for command in (
    train,
    eval,
    compare,
    export,
    bench,
    info,
    search,
    embed,
    dedupe,
    cluster,
    verify,
    serve,
    atlas,
    check,
    data,
    list_,
    doctor,
    demo,
):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(index_group)
_NAMES = {str(one.name) for one in app.registered_commands} | {str(index_group.info.name)}


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show versions and end.")] = False,
) -> None:
    if version:
        typer.echo("\n".join(_versions()))
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(_START, nl=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    state: dict[str, Any] = {"verbose": False}
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments, state))


def _run(arguments: list[str], state: dict[str, Any]) -> int:
    try:
        whole = _only(arguments[0]) if arguments and arguments[0] in _NAMES else app
        code = whole(arguments, prog_name="embedkit", standalone_mode=False, obj=state)
    except EmbedKitError as error:
        if state["verbose"]:
            traceback.print_exc()
        show_error(error)
        return error.exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "embedkit"
        show_error(UsageError(error.format_message(), hint=f"{path} --help"))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        show_error(Interrupted("interrupted"))
        return Interrupted.exit_code
    except BrokenPipeError:
        # The reader of our stdout has left (`| head`): nobody is there to be told.
        sys.stderr.close()
        return 1
    except Exception as error:
        if state["verbose"]:
            traceback.print_exc()
        package = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if package and package.partition(".")[0] in _TRAINING:
            missing = MissingExtraError(f"embedkit {arguments[0]}", package=package, extra="train")
            show_error(missing)
            return missing.exit_code
        show_error(
            EmbedKitError(
                "something unforeseen happened; this is a fault of embedkit",
                facts=f"{type(error).__name__}: {error}",
                hint="the same command with -v shows where; please report it",
            )
        )
        return 1
    return code if isinstance(code, int) else 0


def _only(name: str) -> typer.Typer:
    """The command line with this command alone: Typer takes 0.1 s to build them all."""
    one = copy.copy(app)
    one.registered_commands = [own for own in app.registered_commands if own.name == name]
    one.registered_groups = app.registered_groups if name == index_group.info.name else []
    return one


def _versions() -> list[str]:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    lines = [f"embedkit {__version__} (Python {sys.version.split()[0]})"]
    for package in _PACKAGES:
        try:
            lines.append(f"  {package} {version_of(package)}")
        except PackageNotFoundError:
            lines.append(f"  {package} not installed")
    return lines


if __name__ == "__main__":
    main()
