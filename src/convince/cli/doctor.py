"""convince doctor: versions, devices, what the processor can do, which precision will be used."""

from __future__ import annotations

import click

from convince.cli import emit, json_option


@click.command()
@click.option("--measure", is_flag=True, help="Also multiply matrices to measure the peak in each number format (2 s).")
@json_option
def command(measure: bool, as_json: bool) -> None:
    """Say what this machine can do and what a run would use."""
    from convince.fit import kernels
    from convince.fit.folder import environment
    from convince.fit.precision import choose, peak_flops

    plan = choose()
    facts = environment()
    del facts["command"]
    facts["plan"] = {"device": plan.device, "precision": plan.precision, "channels_last": plan.channels_last, "reason": plan.reason}
    if plan.device == "cpu":
        facts["kernels"] = [
            {"kind": kind, "job": job, "way": str(best), "ms": round(times[best], 3), "library_ms": round(times[kernels.Way()], 3)}
            for kind, jobs in kernels.measured(plan.precision, plan.channels_last).items()
            for job, times in jobs.items()
            for best in [kernels.best(times)]
        ]
    if measure:
        facts["tflops"] = {name: round(peak_flops(name) / 1e12, 3) for name in ("fp32", "bf16")}
    lines = [f"{name:<16} {value}" for name, value in facts.items() if not isinstance(value, (dict, list))]
    lines += [f"{name:<16} {version}" for name, version in facts["versions"].items()]
    lines.append(f"a run will use   {plan.precision}{', channels_last' if plan.channels_last else ''} on {plan.device}: {plan.reason}")
    if "kernels" in facts:
        lines += ["", "convolutions, the fastest measured way (ms a pass; the library's own):"]
        lines += [f"  {r['kind']:<24} {r['job']:<6} {r['way']:<42} {r['ms']:>7.2f} {r['library_ms']:>8.2f}" for r in facts["kernels"]]
    lines += [f"{name} peak        {value} TFLOP/s" for name, value in facts.get("tflops", {}).items()]
    emit(facts, as_json, "\n".join(lines))
