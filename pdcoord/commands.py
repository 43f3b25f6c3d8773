"""The commands of `pdcoord`: one function per command, each a thin call into the package that does the work.

Imports stand inside the commands, so that `pdcoord policy check` does not load a web server.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pdcoord.wire.extras import missing_package

app = typer.Typer(
    name="pdcoord",
    help="One OpenAI endpoint over a mixed-vendor fleet, with prefill and decode on the pods that suit them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
policy_app = typer.Typer(help="Check policy files and print their schema.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")
keys_app = typer.Typer(help="Make API keys and check the file that lets them in.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

AdminKeyFile = Annotated[
    Path | None,
    typer.Option(envvar="PDCOORD_ADMIN_KEY_FILE", help="Key of the admin listener, if it asks for one."),
]
AdminCaFile = Annotated[
    Path | None,
    typer.Option(envvar="PDCOORD_ADMIN_CA_FILE", help="Who signed its certificate, for an https:// URL."),
]


@contextmanager
def _installed(command: str, extra: str) -> Iterator[None]:
    """Imports within that fail for a package that is not installed end the command: exit status 2.

    Args:
        extra: of the command, that brings what it needs.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(missing_package(command, error, extra), err=True)
        raise typer.Exit(2) from None


@app.command()
def serve(
    policy: Annotated[
        Path | None, typer.Option(help="PoolPolicy file; re-read when it changes. [env: PDCOORD_POLICY]")
    ] = None,
    endpoints: Annotated[
        Path | None,
        typer.Option(help="Endpoints file for pools with a selector; re-read. [env: PDCOORD_ENDPOINTS]"),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address for clients. [env: PDCOORD_HOST; default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port for clients. [env: PDCOORD_PORT; default: 8080]")
    ] = None,
    admin_host: Annotated[
        str | None,
        typer.Option(help="Address of the admin listener. [env: PDCOORD_ADMIN_HOST; default: 127.0.0.1]"),
    ] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Port of the admin listener. [env: PDCOORD_ADMIN_PORT; default: 8081]")
    ] = None,
) -> None:
    """Serve OpenAI traffic over the fleet that a policy describes.

    Further settings are environment variables, PDCOORD_*; docs/gateway.md lists them.
    """
    from pdcoord.runtime.serve import serve as run
    from pdcoord.runtime.settings import SettingsError, load_settings

    try:
        settings = load_settings(
            policy=policy,
            endpoints=endpoints,
            host=host,
            port=port,
            admin_host=admin_host,
            admin_port=admin_port,
        )
    except SettingsError as error:
        typer.echo(f"pdcoord serve: not started: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(run(settings))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def extproc(context: typer.Context) -> None:
    """Pick endpoints for Envoy: the external processor that a Gateway's InferencePool refers to."""
    with _installed("pdcoord extproc", "extproc"):
        from pdcoord.runtime.extproc import main as run
    raise typer.Exit(run(context.args))


@app.command()
def explain(
    request_id: Annotated[
        str | None, typer.Argument(help="The x-request-id; the last request without it.")
    ] = None,
    admin_url: Annotated[
        str, typer.Option(envvar="PDCOORD_ADMIN_URL", help="Admin listener of the gateway.")
    ] = "http://127.0.0.1:8081",
    admin_key_file: AdminKeyFile = None,
    admin_ca_file: AdminCaFile = None,
) -> None:
    """Print why a request was served the way it was."""
    from pdcoord.runtime.explain import explain as run

    raise typer.Exit(run(request_id, admin_url, admin_key_file, admin_ca_file))


@app.command()
def paths(
    layouts: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Judge a producer of layout A and a consumer of layout B instead: each a preset "
            "(cpu-vec), a preset with overrides (cpu-vec:block_tokens=32) or keys of a policy's layout "
            "(block_tokens=128,order=HND).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    admin_url: Annotated[
        str, typer.Option(envvar="PDCOORD_ADMIN_URL", help="Admin listener of the gateway.")
    ] = "http://127.0.0.1:8081",
    admin_key_file: AdminKeyFile = None,
    admin_ca_file: AdminCaFile = None,
) -> None:
    """Print every path that the gateway knows, with verdict, breaker, bandwidth and probes.

    With --layouts the exit status is 0 if KV can move, 1 if not, 2 if A or B is no layout.
    Without, it is 2 if the gateway does not answer.
    """
    if layouts is not None:
        from pdcoord.runtime.layout_pair import compare

        raise typer.Exit(compare(*layouts, as_json=as_json))
    from pdcoord.runtime.paths_table import show_paths

    raise typer.Exit(
        show_paths(admin_url, as_json=as_json, admin_key_file=admin_key_file, admin_ca_file=admin_ca_file)
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def preflight(context: typer.Context) -> None:
    """Check whether this node can move KV: RoCE devices, UCX transports, NIXL plugins, memory limits."""
    try:
        from transfer.preflight import main as run
    except ModuleNotFoundError as error:
        typer.echo(f"pdcoord preflight needs {error.name}: pip install 'pdcoord[transfer]'", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(run(context.args))


@app.command()
def emulate(
    fleet: Annotated[Path, typer.Argument(help="EmulatedFleet file.")],
    engine: Annotated[list[str] | None, typer.Option(help="Run only this engine; may be repeated.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on, in place of the file's; for one engine.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the API, in place of the file's; for one engine.")
    ] = None,
    advertise_host: Annotated[
        str | None,
        typer.Option(help="Address that other engines are told to dial, as a pod's IP; for one engine."),
    ] = None,
) -> None:
    """Run emulated engines until stopped."""
    with _installed("pdcoord emulate", "emulator"):
        from pdcoord.sim.emulator import run
        from pdcoord.sim.fleetfile import Placement
    placement = Placement(host=host, port=port, advertise_host=advertise_host)
    raise typer.Exit(run(fleet, engine or [], placement))


@app.command(
    "emulate-vllm",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def emulate_vllm(context: typer.Context) -> None:
    """Run one emulated engine that is told what it is as `vllm serve` is, in a pod made for vLLM."""
    with _installed("pdcoord emulate-vllm", "emulator"):
        from pdcoord.sim.emulator_vllm import main as run
    raise typer.Exit(run(context.args))


@app.command()
def simulate(
    policy: Annotated[Path, typer.Option(help="PoolPolicy file.")],
    fleet: Annotated[Path, typer.Option(help="EmulatedFleet file; its engines are those of the policy.")],
    workload: Annotated[Path, typer.Option(help="Workload file.")],
    router: Annotated[
        list[str] | None,
        typer.Option(
            help="pdcoord, or a rival, with +cross behind it as if it could move KV between vendors; "
            "may be repeated. [default: pdcoord]",
        ),
    ] = None,
    rate_scale: Annotated[
        list[float] | None,
        typer.Option(help="Factor of the workload's rates; repeated for a sweep. [default: 1]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the workload's.")] = None,
    until_s: Annotated[float | None, typer.Option(help="Cut every run off there.")] = None,
    signal_age_s: Annotated[float, typer.Option(help="How old metrics are when routers hear of them.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Folder for results, summary and plots.")] = None,
    svg: Annotated[bool, typer.Option("--svg", help="Plots as SVG too.")] = False,
) -> None:
    """Run a workload on an emulated fleet in virtual time, under pdcoord or a rival.

    Deterministic: equal files, options and seed give equal results. The exit status is 2 if a file or an
    option cannot be used.
    """
    with _installed("pdcoord simulate", "study"):
        from pdcoord.sim.study.simulate import Order
        from pdcoord.sim.study.simulate import simulate as run
    order = Order(
        policy=policy,
        fleet=fleet,
        workload=workload,
        routers=router or ["pdcoord"],
        rate_scales=rate_scale or [1.0],
        seed=seed,
        until_s=until_s,
        signal_age_s=signal_age_s,
        out=out,
        is_svg=svg,
    )
    raise typer.Exit(run(order))


@app.command()
def replay(
    log: Annotated[Path, typer.Argument(help="Results of simulate, or the gateway's log.")],
    policy: Annotated[Path, typer.Option(help="PoolPolicy file to decide by.")],
    fleet: Annotated[
        Path | None,
        typer.Option(help="EmulatedFleet file; without it engines are what the policy believes of them."),
    ] = None,
    endpoints: Annotated[
        Path | None, typer.Option(help="Endpoints file for pools with a selector, where there is no fleet.")
    ] = None,
    router: Annotated[str, typer.Option(help="Who decides, as in simulate.")] = "pdcoord",
    rate_scale: Annotated[float, typer.Option(help="2 sends the calls at twice their rate.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the run.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for a JSON line of each request.")] = None,
) -> None:
    """Decide recorded traffic again under a policy, and show what changes, request by request.

    The traffic runs in the simulator. The exit status is 2 if a file or an option cannot be used; a bad line
    of the log is named and left out.
    """
    with _installed("pdcoord replay", "study"):
        from pdcoord.sim.study.replay import ReplayOrder
        from pdcoord.sim.study.replay import replay as run
    order = ReplayOrder(
        log=log,
        policy=policy,
        fleet=fleet,
        endpoints=endpoints,
        router=router,
        rate_scale=rate_scale,
        seed=seed,
        out=out,
    )
    raise typer.Exit(run(order))


@app.command()
def plan(
    fleet: Annotated[Path, typer.Option(help="EmulatedFleet file.")],
    workload: Annotated[Path, typer.Option(help="Workload file.")],
    ttft_ms: Annotated[
        float | None, typer.Option(min=1, help="Objective of calls for which the workload has none.")
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(min=1, help="The same for the time per output token.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Try the advice in the simulator.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which engines should prefill, decode or do both, what holds them back, and what one more buys.

    The exit status is 1 if there is no advice, 2 if a file cannot be used.
    """
    with _installed("pdcoord plan", "study"):
        from pdcoord.sim.advise.plan import PlanOrder
        from pdcoord.sim.advise.plan import plan as run
    order = PlanOrder(
        fleet=fleet,
        workload=workload,
        ttft_s_max=None if ttft_ms is None else ttft_ms / 1e3,
        tpot_s_max=None if tpot_ms is None else tpot_ms / 1e3,
        is_checked=check,
        is_json=as_json,
    )
    raise typer.Exit(run(order))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the fleet running until Ctrl-C.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the traffic.")] = 7,
) -> None:
    """Serve traffic over three emulated vendors, kill a pod half-way, and compare with round robin."""
    from pdcoord.sim.demo.run import run

    raise typer.Exit(run(keep=keep, seed=seed))


@keys_app.command("init")
def keys_init() -> None:
    """Print a keys file without keys and with a new secret for cache salts, to be kept with mode 0600."""
    from pdcoord.runtime.keycommands import init

    raise typer.Exit(init())


@keys_app.command("make")
def keys_make(
    name: Annotated[str, typer.Argument(help="Name of the key, in logs and metrics.")],
    tenant: Annotated[str, typer.Option(help="Whose calls these are.")],
    salt_group: Annotated[
        str | None, typer.Option(help="Share prefix caches with keys of this group, whatever their tenants.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model that may be asked; may be repeated. [default: all]")
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="An objective above priority 0 that may be asked for, or * for all; may be repeated. "
            "[default: none]"
        ),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="[default: no limit]")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Of prompts and answers together. [default: no limit]")
    ] = None,
    expires_at: Annotated[
        str | None, typer.Option(help="Such as 2027-06-30T00:00:00Z. [default: never]")
    ] = None,
) -> None:
    """Make a key: the key goes to stderr, this once, and its entry for the keys file to stdout."""
    from pdcoord.runtime.keycommands import make

    wanted = {
        "tenant": tenant,
        "salt_group": salt_group,
        "models": model or None,
        "objectives": objective or None,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "expires_at": expires_at,
    }
    raise typer.Exit(make(name, wanted))


@keys_app.command("check")
def keys_check(
    files: Annotated[list[Path], typer.Argument(help="ApiKeys files.")],
) -> None:
    """Say what is wrong with keys files, or what they allow; exit 1 if any is wrong."""
    from pdcoord.runtime.keycommands import check

    raise typer.Exit(check(files))


@policy_app.command("check")
def policy_check(
    files: Annotated[list[Path], typer.Argument(help="PoolPolicy files.")],
) -> None:
    """Say what is wrong with policy files, or what they describe; exit 1 if any is wrong."""
    from pdcoord.policy.commands import check

    raise typer.Exit(check(files))


@policy_app.command("schema")
def policy_schema() -> None:
    """Print the JSON Schema of a policy document."""
    from pdcoord.policy.commands import schema

    typer.echo(schema())


@policy_app.command("crd")
def policy_crd() -> None:
    """Print the CustomResourceDefinition of PoolPolicy objects, for kubectl apply."""
    from pdcoord.policy.commands import definition

    typer.echo(definition(), nl=False)
