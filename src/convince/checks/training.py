"""Checks of what is switched on by ``--with``: bits, off, resume, reload, gradients, names."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from convince.checks import Nothing
from convince.checks.subject import Subject, bits, equal
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.run import must_survive
from convince.fit.state import named
from convince.parts import spell


class _Killed(Exception):
    pass


def check_claims_are_its_slots(s: Subject) -> None:
    """The card's ``claims`` are the slots that the object owns."""
    owned = s.trained.team.seats[0].claims
    assert set(s.card.claims) == set(owned), f"the card claims {s.card.claims}, the object owns {owned}"


def check_same_seed_same_bits(s: Subject) -> None:
    """Two fits with one seed end with equal weights; another seed with others."""
    again = s.run(s.spec)
    fit(again)
    differs = equal(bits(s.trained.answer), bits(again.answer))
    assert not differs, f"two fits with the same seed differ in {differs}"
    other = s.fitted(s.spec, seed=1)
    assert equal(bits(s.trained.model), bits(other.model)), "another seed gives the same weights"


def check_global_random_state_is_put_back(s: Subject) -> None:
    """After a fit torch's and numpy's global state are as before."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    fit(s.run(s.spec, epochs=1))
    assert torch.equal(states[0], torch.get_rng_state()), "torch's global random state moved"
    assert (states[1] == np.random.get_state()[1]).all(), "numpy's global random state moved"  # type: ignore[index]


def check_inputs_are_unchanged(s: Subject) -> None:
    """The samples, labels and split of the data are as before."""
    x, y = s.data.x.take(torch.arange(len(s.data.y))).clone(), s.data.y.clone()
    train = s.data.split.train.clone()
    fit(s.run(s.spec, epochs=1))
    assert torch.equal(x, s.data.x.take(torch.arange(len(y)))), "the samples were changed"
    assert torch.equal(y, s.data.y), "the labels were changed"
    assert torch.equal(train, s.data.split.train), "the split was changed"


def check_off_is_the_baseline(s: Subject) -> None:
    """At strength off, undropped, the weights are the baseline's, bit for bit."""
    if s.card.strength is None:
        raise Nothing("the part has no strength to switch off")
    off = spell(s.part.name, {**s.options, s.card.strength: s.card.off})
    run = s.fitted(off, drop_off=False)
    differs = equal(bits(s.baseline.answer), bits(run.answer))
    assert not differs, f"{off} differs from the baseline in {differs}"


def check_on_is_not_the_baseline(s: Subject) -> None:
    """Switched on, the answer differs from the baseline; a part that only measures changes nothing."""
    x, _ = s.pixels(16)
    with torch.no_grad():
        same = not equal(bits(s.baseline.answer), bits(s.trained.answer)) and torch.equal(s.baseline.answer.eval()(x), s.trained.answer.eval()(x))
    if hasattr(s.trained.team.seats[0].technique, "readings") and not s.card.claims:
        assert same, "a part that only measures changed the weights"
        return
    assert not same, "switched on, the part changes nothing (a silent no-op)"


def check_every_parameter_gets_a_gradient(s: Subject) -> None:
    """In each stage every parameter that the stage trains gets a gradient, less those the card calls idle."""
    run = s.run(s.spec)
    missing: dict[int, set[str]] = {}

    class Watch:
        def __call__(self, done: int, total: int, text: str) -> None:
            lacks = {n for n, p in named(run) if p.requires_grad and p.grad is None}
            missing[run.stage_number] = missing.get(run.stage_number, lacks) & lacks

    fit(run, None, Watch())
    for stage, names in missing.items():
        bad = sorted(n for n in names if not any(n.startswith(word) or word in n for word in s.card.idle))
        if stage < len(missing) - 1:  # a stage before: the head of the main stage rests
            bad = [n for n in bad if not n.startswith(("fc.", "head.", "classifier.", "extra."))]
        assert not bad, f"in stage {stage} {bad[0]} never got a gradient; list it in idle where that is right"


def check_old_names_survive(s: Subject) -> None:
    """Parameters of the plain network keep their names, so stored weights still fit; less those that a layer says it swaps."""
    lost = must_survive(s.baseline.model, s.card.swaps) - {n for n, _ in s.trained.model.named_parameters()}
    assert not lost, f"the parameter {sorted(lost)[0]!r} was renamed or removed"


def check_resume_gives_the_same_bits(s: Subject) -> None:
    """Killed in the middle of an epoch and resumed, the run ends with the bits of an undisturbed one."""
    path = s.folder / "checkpoint.safetensors"
    whole = s.trained
    for at in (3, 6):
        path.unlink(missing_ok=True)
        steps = 0

        def stop(done: int, total: int, text: str, at: int = at) -> None:
            nonlocal steps
            steps += 1
            if steps == at:
                raise _Killed

        with contextlib.suppress(_Killed):
            fit(s.run(s.spec), path, stop)
        again = s.run(s.spec)
        fit(again, path)
        differs = equal(bits(whole.answer), bits(again.answer))
        assert not differs, f"resumed after step {at}, the run differs in {differs}"


def check_reload_gives_the_same_answer(s: Subject) -> None:
    """Written to a folder and opened again, the run gives equal scores."""
    run = s.trained
    folder = s.folder / "run"
    folder.mkdir(exist_ok=True)
    write_config(folder, run.settings)
    write_model(folder, run)
    x = s.data.x.take(torch.arange(16))
    from convince.fit.answer import logits_of

    kept = logits_of(run.answer.eval(), x, run.plan)
    loaded = open_run(folder, trust=True)
    assert torch.equal(kept, loaded.logits(x)), "the reloaded run gives other scores"


def check_double_precision_works(s: Subject) -> None:
    """No dtype is hard-coded: a step in fp64 gives fp64 weights and finite numbers."""
    run = s.fitted(s.spec, precision="fp64", epochs=1)
    for name, tensor in run.model.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float64, f"{name} is {tensor.dtype} in an fp64 run"
            assert bool(torch.isfinite(tensor).all()), f"{name} is not finite"
