"""`embedkit index FOLDER`, or a verb with an index: the first word tells which is meant."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from embedkit.cli.index import index
from embedkit.cli.index_migrate import migrate
from embedkit.cli.index_verbs import add, compact, merge, rm, verify
from embedkit.cli.info import info

__all__ = ["index_group"]

_VERBS = "Verbs (a folder of this name is reached as ./NAME)"


class _FolderOrVerb(TyperGroup):
    """A first word that is no verb is the folder; then this is a command like any other."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] in self.commands:
            ctx.args = args  # the verb's, from its name on: `invoke` parses them
            return args
        if len(args) > 1 and not Path(args[0]).exists() and not args[1].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            if near:
                ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        ctx.allow_extra_args, ctx.allow_interspersed_args = False, True
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if not ctx.args:
            return super().invoke(ctx)
        name, *rest = ctx.args
        verb = self.commands[name]
        # A child of the whole and not of the folder's command, whose arguments it has not.
        with verb.make_context(f"{ctx.info_name} {name}", rest, parent=ctx.parent) as own:
            return verb.invoke(own)


index_group = typer.Typer(
    name="index",
    cls=_FolderOrVerb,
    invoke_without_command=True,
    subcommand_metavar="| VERB ...",
    rich_markup_mode="rich",
)
index_group.callback()(index)
for verb in (add, rm, compact, verify, merge, migrate, info):
    index_group.command(rich_help_panel=_VERBS)(verb)
