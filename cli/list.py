"""`embedkit list losses` and `embedkit list loss rll`"""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from embedkit.cli.display import AsJson, Display, Quiet, Verbose
from embedkit.errors import UnknownNameError, UsageError

__all__ = ["list_"]

_KINDS = {"losses": "loss", "methods": "method", "backbones": "backbone", "recipes": "recipe"}
_WIDEST = 100
_PEER = "pml:"


def list_(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="losses, methods, backbones or recipes.")
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="All about this one.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the losses, methods, backbones and recipes there are.

    Example: embedkit list loss rll
    """
    display = Display(as_json=as_json, quiet=quiet)
    kind = _KINDS.get(what, what)
    if kind not in _KINDS.values():
        raise UnknownNameError("list", what, [*_KINDS, *_KINDS.values()])
    if name is not None:
        page = _read(kind, name)
        display.answer(_whole(page))
        display.document("list", {"what": kind, "entry": _content(page)})
        if page.next:
            display.note("next", page.next)
        return
    if what not in _KINDS:
        raise UsageError(f"which {kind}?", hint=f"embedkit list {what} NAME")
    pages = [_read(kind, known) for known in _names(kind)]
    wide = max((len(page.name) for page in pages), default=0) + 2
    display.answer("\n".join(_entry(page, wide) for page in pages))
    display.document("list", {"what": what, "entries": [_content(page) for page in pages]})
    if kind == "loss":
        display.note("also", "pml:NAME, any loss of pytorch-metric-learning; methods have a list")
    display.note("next", f"embedkit list {kind} {pages[0].name}")


@dataclass(frozen=True)
class _Page:
    """What there is to say about one name.

    Attributes:
        name: As it is typed.
        about: One line.
        facts: Label and value, None where there is none; the list shows those in `below`.
        below: Labels of the facts that stand below `about` in the list.
        text: More about it, for reading; may hold formulas, which are indented.
        options: Name, default and meaning.
        next: What to type.
    """

    name: str
    about: str
    facts: dict[str, Any]
    below: tuple[str, ...]
    text: str = ""
    options: list[tuple[str, Any, str]] = field(default_factory=list)
    next: str = ""


def _names(kind: str) -> list[str]:
    if kind == "recipe":
        from embedkit.cli.recipes import recipe_names

        return recipe_names()
    if kind == "backbone":
        from embedkit.models import backbone_names

        return backbone_names()
    from embedkit import losses, methods

    return losses.names() if kind == "loss" else methods.method_names()


def _read(kind: str, name: str) -> _Page:
    pages = {"loss": _loss, "method": _method, "backbone": _backbone, "recipe": _recipe}
    return pages[kind](name)


def _loss(name: str) -> _Page:
    """A loss; a method of this name where there is no such loss, because ``--loss`` takes both."""
    from embedkit import losses, methods

    known = methods.options(name)
    if name.startswith(_PEER):
        about = f"{name.removeprefix(_PEER)} of pytorch-metric-learning"
        theirs = {"certainty": "theirs", "learns from": "classes"}
        options = [(option, default, "") for option, default in known.items()]
        return _Page(name, about, theirs, (), "", options, _train(name, known, "classes"))
    if name not in losses.names():
        return _method(name)
    kind = losses.loss_class(name)
    special = losses.special_batch(name)
    facts: dict[str, Any] = {"certainty": kind.certainty, "takes": special or None}
    if methods.is_method(name):
        facts["method"] = f"of the same name, which is what --loss {name} trains"
    fit = methods.is_method(name) or not special
    then = _train(name, known, methods.learns_from(name)) if fit else ""
    return _described(name, kind, losses.options(name), facts, then)


def _method(name: str) -> _Page:
    from embedkit import methods

    kind = methods.method_class(name)
    known = methods.options(name)
    facts = {"certainty": kind.certainty, "learns from": kind.learns_from}
    return _described(name, kind, known, facts, _train(name, known, kind.learns_from))


def _described(
    name: str, kind: type, options: dict[str, Any], facts: dict[str, Any], then: str
) -> _Page:
    from embedkit.cli.described import describe

    said = describe(kind)
    means = [(option, default, said.options.get(option, "")) for option, default in options.items()]
    facts = {"paper": said.short or None, **facts}
    text = "\n\n".join(part for part in (said.paper, said.text) if part)
    return _Page(name, said.about, facts, ("paper", "certainty"), text, means, then)


def _backbone(name: str) -> _Page:
    from embedkit.models import backbone_entry

    entry = backbone_entry(name)
    facts = {
        "paper": entry.paper,
        "weights": entry.weights or "none but your own",
        "trained at": f"{entry.image_size} pixels",
    }
    then = f"embedkit train ./photos --backbone {name}"
    return _Page(name, entry.about, facts, ("paper", "weights"), next=then)


def _recipe(name: str) -> _Page:
    import tomllib

    from embedkit.cli.recipes import FACTS, read_recipe

    recipe = read_recipe(name)
    facts = {word.lower(): recipe.facts.get(word) for word in FACTS}
    settings = tomllib.loads(recipe.text)
    chosen = settings.pop("loss_options", {})
    options = [(key, value, "") for key, value in [*settings.items(), *chosen.items()]]
    then = f"embedkit train DATA --config {name} --dry-run"
    return _Page(name, recipe.title, facts, ("reported",), "", options, then)


def _train(name: str, options: dict[str, Any], learns_from: str) -> str:
    """A command that trains it, with its first option as it is."""
    data = "./photos" if learns_from in ("classes", "images") else f"{learns_from}.csv"
    given = next((f" -s {key}={_typed(value)}" for key, value in options.items()), "")
    return f"embedkit train {data} --loss {name}{given}"


def _typed(value: Any) -> str:
    """A default as ``-s`` takes it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# --- shown ---------------------------------------------------------------------------------------


def _content(page: _Page) -> dict[str, Any]:
    facts = {label.replace(" ", "_"): value for label, value in page.facts.items()}
    options = [
        {"name": name, "default": default, **({"meaning": meaning} if meaning else {})}
        for name, default, meaning in page.options
    ]
    return {"name": page.name, "about": page.about, **facts, "options": options}


def _entry(page: _Page, wide: int) -> str:
    shown = [(label, page.facts[label]) for label in page.below if page.facts[label]]
    below = "; ".join(text if label == "paper" else f"{label}: {text}" for label, text in shown)
    first = f"{page.name:<{wide}}{_beside(page.about, wide)}"
    return "\n".join([first, *_wrapped(below, wide)])


def _whole(page: _Page) -> str:
    wide = max(len(label) for label in page.facts) + 2
    facts = [
        f"{label:<{wide}}{_beside(str(value), wide)}"
        for label, value in page.facts.items()
        if value is not None
    ]
    head = "\n".join(_wrapped(f"{page.name}: {page.about}", 0))
    parts = [head, "\n".join(facts), _flowed(page.text), "\n".join(_options(page))]
    return "\n\n".join(part for part in parts if part)


def _options(page: _Page) -> list[str]:
    shown = [(name, _typed(default), meaning) for name, default, meaning in page.options]
    first = max([len(name) for name, _, _ in shown], default=0) + 2
    second = max([len(default) for _, default, _ in shown], default=0) + 2
    return [
        f"{name:<{first}}{default:<{second}}{_beside(_plain(meaning), first + second)}".rstrip()
        for name, default, meaning in shown
    ]


def _flowed(text: str) -> str:
    """Paragraphs wrapped anew; what is indented is a formula and stays as it is."""
    shown = []
    for paragraph in text.split("\n\n"):
        formula = paragraph.startswith("    ")
        shown.append(paragraph if formula else "\n".join(_wrapped(_plain(paragraph), 0)))
    return "\n\n".join(shown)


def _plain(text: str) -> str:
    return text.replace("`", "")


def _beside(text: str, indent: int) -> str:
    """Text that begins in a line already `indent` long."""
    return "\n".join(_wrapped(text, indent)).strip()


def _wrapped(text: str, indent: int) -> list[str]:
    """Lines of the terminal's width, all indented."""
    lines = textwrap.wrap(
        " ".join(text.split()),
        width=_width(),
        initial_indent=" " * indent,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    return lines or [""]


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)
