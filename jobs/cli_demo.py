"""The command `demo`."""

from typing import Annotated

import typer

from jobs.cli_options import ConfigOption, QuietOption, SetOption, load_config
from jobs.progress import Progress

app = typer.Typer()


@app.command(epilog="Example: vitrine demo --config jobs/configs/demo.yaml --compare 1")
def demo(
    config: ConfigOption,
    release: Annotated[
        int | None, typer.Option("--release", help="A release's version; else the newest.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            help="Beside it: a release's version, or a candidate that `--no-publish` built; it "
            "prints the name.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="0.0.0.0: every machine that reaches this one.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")
    ] = 8000,
    overrides: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Serve a web page: search a release by photo, words or both, and compare two."""
    from jobs.demo import DemoOptions
    from jobs.demo import demo as run
    from jobs.demo_hosts import is_loopback

    if not is_loopback(host):
        typer.echo(
            f"vitrine: warning: {host} is not this machine alone: anyone who reaches it can "
            "search, see the catalog and upload photos",
            err=True,
        )
    options = DemoOptions(release=release, compare=compare, host=host, port=port)
    run(load_config(config, overrides), options, Progress(quiet=quiet), typer.echo)
