"""Assembles the commands of `latchkey` and turns every error into an exit code."""

import contextlib
import sys
from typing import Annotated, Final

import typer

from latchkey_cli import (
    access,
    audit,
    bulk,
    changes,
    console,
    find,
    importing,
    listing,
    maintenance,
    output,
    placing,
    proto,
    receiver,
    secrets,
    service,
    status,
    tokens,
    usage,
    verify,
)
from latchkey_cli.failures import ClosedPipe, Exit, Failure
from latchkey_cli.plain import Command, Group

__all__ = ["app", "main"]

# The name under `python -m latchkey_cli` too: shell completion uses it.
NAME: Final = "latchkey"

EPILOG: Final = """\
Exit codes:
  0  success; for verify: VALID
  1  unexpected error, or you answered no to a prompt; for doctor, audit verify
     and migrate --check: something is wrong or missing
  2  invalid usage or argument
  3  token not found; for revoke: a line is not a secret of a token
  4  name already taken
  5  verify: any verdict except VALID
  6  no answer, or no answer in time
  7  permission denied, or unknown caller
130  interrupted by Ctrl-C
141  the reader closed the output pipe
"""

app = typer.Typer(
    name=NAME,
    cls=Group,
    help="Manage API tokens with Latchkey, and verify secrets.",
    epilog=EPILOG,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # Local variables hold secrets.
    pretty_exceptions_show_locals=False,
)
app.command("create", cls=Command)(tokens.create)
app.command("list", cls=Command)(listing.list_tokens)
app.command("get", cls=Command)(tokens.get)
app.command("delete", cls=Command)(tokens.delete)
app.command("update", cls=Command)(changes.update)
app.command("disable", cls=Command)(changes.disable)
app.command("enable", cls=Command)(changes.enable)
app.command("rotate", cls=Command)(changes.rotate)
app.command("retire-secrets", cls=Command)(changes.retire_secrets)
app.command("usage", cls=Command)(usage.usage)
app.command("find", cls=Command)(find.find)
app.command("revoke", cls=Command, context_settings={"allow_extra_args": True})(bulk.revoke)
app.command("delete-all", cls=Command)(bulk.delete_all)
app.command("import", cls=Command)(importing.import_tokens)
app.command("verify", cls=Command, context_settings={"allow_extra_args": True})(verify.verify)
app.command("status", cls=Command)(status.status)
app.command("invalidate-all", cls=Command)(maintenance.invalidate_all)
app.command("audit", cls=Command)(audit.audit)
app.command("console", cls=Command)(console.console)
app.command("receiver", cls=Command)(receiver.receiver)
app.command("serve", cls=Command)(service.serve)
app.command("policy", cls=Command)(service.policy)
app.command("dev-ca", cls=Command)(service.dev_ca)
app.command("migrate", cls=Command)(service.migrate)
app.command("doctor", cls=Command)(service.doctor)
app.command("proto", cls=Command)(proto.proto)
app.command("config", cls=Command)(service.config)


def _print_version(wanted: bool) -> None:
    if wanted:
        # Imported here: it takes a third of the tool's startup time.
        import importlib.metadata
        import importlib.resources

        version = importlib.metadata.version("latchkey-cli")
        # Only wheels name their build: the files of a clone may have any state.
        with contextlib.suppress(FileNotFoundError):
            file = importlib.resources.files("latchkey_cli").joinpath("BUILD")
            version += f"+{file.read_text('ascii').strip()}"
        output.write(sys.stdout, f"{NAME} {version}\n")
        if (schema := service.schema_number()) is not None:
            output.write(sys.stdout, f"service with schema {schema}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[  # noqa: ARG001 - the callback acts on it
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    tls_ca: access.CaOption = None,
    tls_certificate: access.CertificateOption = None,
    tls_key: access.KeyOption = None,
    credential_file: access.CredentialFileOption = None,
) -> None:
    """Store the options that belong to no single command. `placing` moves them here."""
    access.choose(tls_ca, tls_certificate, tls_key, credential_file)


def main() -> int:
    """Run the tool with `sys.argv` and return its exit code."""
    arguments = sys.argv[1:]
    try:
        try:
            output.prepare()
            return _run(arguments)
        except Failure as failure:
            output.report(failure, as_json="--json" in arguments)
            return failure.exit_code
        except OSError as error:
            # Standard output is closed, or its disk is full. No other file is written here.
            unwritten = Failure(
                f"cannot write the output: {error.strerror}",
                "send it somewhere else; note that the command may have taken effect",
                Exit.UNEXPECTED,
                code="OUTPUT_NOT_WRITTEN",
            )
            output.report(unwritten, as_json="--json" in arguments)
            return unwritten.exit_code
        except KeyboardInterrupt:
            # At a prompt, the cursor is still on the line that the user was typing.
            output.write(sys.stderr, "\n")
            return Exit.INTERRUPTED
    except ClosedPipe:
        return Exit.CLOSED_PIPE
    finally:
        output.silence()


def _run(arguments: list[str]) -> int:
    # Checked before parsing, because the parser's error messages quote the argument.
    if (position := secrets.find_secret(arguments)) is not None:
        raise verify.refusal(f"argument {position}, which looks like a secret")
    if (meant := placing.long_option_with_one_dash(arguments, _long_options)) is not None:
        raise Failure(
            f"'{meant[1:]}' has one dash, and long options have two",
            f"write {meant}; see '{NAME} --help'",
            Exit.USAGE,
            code="USAGE",
        )
    try:
        code = app(args=placing.placed(arguments), prog_name=NAME, standalone_mode=False)
    except typer.TyperException as error:
        # Without arguments, the parser has already printed the help.
        if not arguments:
            return Exit.USAGE
        raise _usage_failure(error) from None
    return code if isinstance(code, int) else Exit.OK


def _long_options() -> set[str]:
    """Return the names of all options of all commands."""
    group = typer.main.get_command(app)
    commands = [group, *getattr(group, "commands", {}).values()]
    return {
        name
        for command in commands
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--")
    }


def _usage_failure(error: typer.TyperException) -> Failure:
    context = getattr(error, "ctx", None)
    command = NAME if context is None else context.command_path
    # The parser wraps its messages for a frame that we do not draw.
    what = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    to_do = f"see '{command} --help'"
    # Only errors about unknown options have this.
    option = getattr(error, "option_name", "--")
    if not option.startswith("--"):
        to_do += "; put '--' before an argument that begins with a dash"
    return Failure(what, to_do, Exit.USAGE, code="USAGE")
