"""`latchkey`: the commands put together, and the one place where the tool ends."""

import sys
from typing import Annotated, Final

import typer

from latchkey_cli import (
    access,
    audit,
    console,
    maintenance,
    output,
    secrets,
    service,
    status,
    tokens,
    verify,
)
from latchkey_cli.failures import ClosedPipe, Exit, Failure
from latchkey_cli.plain import Command, Group

__all__ = ["app", "main"]

# Also when started as `python -m latchkey_cli`: completion asks by this name.
NAME: Final = "latchkey"

EPILOG: Final = """\
Exit codes:
  0  done; for verify: VALID
  1  unexpected failure, or you said no to delete
  2  wrong usage or argument
  3  no such token
  4  the name is taken
  5  verify: any verdict but VALID
  6  no answer, or not in time
  7  permission denied, or caller not known
130  interrupted by Ctrl-C
141  the reader of the output is gone
"""

app = typer.Typer(
    name=NAME,
    cls=Group,
    help="Manage API tokens with Latchkey, and verify secrets.",
    epilog=EPILOG,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # Locals hold secrets.
    pretty_exceptions_show_locals=False,
)
app.command("create", cls=Command)(tokens.create)
app.command("list", cls=Command)(tokens.list_tokens)
app.command("get", cls=Command)(tokens.get)
app.command("delete", cls=Command)(tokens.delete)
app.command("verify", cls=Command, context_settings={"allow_extra_args": True})(verify.verify)
app.command("status", cls=Command)(status.status)
app.command("invalidate-all", cls=Command)(maintenance.invalidate_all)
app.command("audit", cls=Command)(audit.audit)
app.command("console", cls=Command)(console.console)
app.command("serve", cls=Command)(service.serve)
app.command("policy", cls=Command)(service.policy)
app.command("config", cls=Command)(service.config)


def _print_version(wanted: bool) -> None:
    if wanted:
        # Imported where needed: it costs a third of the tool's start.
        import importlib.metadata

        output.write(sys.stdout, f"{NAME} {importlib.metadata.version('latchkey')}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
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
    """Take the options that belong to no command."""
    access.choose(tls_ca, tls_certificate, tls_key, credential_file)


def main() -> int:
    """Run the tool with the process's arguments and return its exit code."""
    arguments = sys.argv[1:]
    try:
        try:
            output.prepare()
            return _run(arguments)
        except Failure as failure:
            output.report(failure, as_json="--json" in arguments)
            return failure.exit_code
        except OSError as error:
            # Standard output is a full disk, or closed. Nothing else here is a file.
            unwritten = Failure(
                f"cannot write the output: {error.strerror}",
                "send it somewhere else, and mind that what was asked for may be done",
                Exit.UNEXPECTED,
                code="OUTPUT_NOT_WRITTEN",
            )
            output.report(unwritten, as_json="--json" in arguments)
            return unwritten.exit_code
        except KeyboardInterrupt:
            # At a prompt: what the person typed so far stands in the line.
            output.write(sys.stderr, "\n")
            return Exit.INTERRUPTED
    except ClosedPipe:
        return Exit.CLOSED_PIPE
    finally:
        output.silence()


def _run(arguments: list[str]) -> int:
    # Before anything is parsed: the parser's own messages repeat what they do not like.
    if (position := secrets.find_secret(arguments)) is not None:
        raise verify.refusal(f"argument {position}, which looks like a secret")
    try:
        code = app(args=arguments, prog_name=NAME, standalone_mode=False)
    except typer.TyperException as error:
        # Its help is printed already when it was asked for nothing.
        if not arguments:
            return Exit.USAGE
        raise _usage_failure(error) from None
    return code if isinstance(code, int) else Exit.OK


def _usage_failure(error: typer.TyperException) -> Failure:
    context = getattr(error, "ctx", None)
    command = NAME if context is None else context.command_path
    # The parser breaks lines for its own frame.
    what = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    return Failure(what, f"'{command} --help' shows how", Exit.USAGE, code="USAGE")
