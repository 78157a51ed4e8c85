"""fit_members: further runs inside a fit; their answers are combined, stored, resumed and loaded."""

import pytest
import torch
from torch import nn

from convince import parts
from convince.checks.subject import tiny_images
from convince.fit.folder import open_run
from convince.fit.settings import settings
from convince.fit.train import prepare, train

COMMITTEE = '''"""Committee: the mean of this network and of others with other seeds."""
import torch
from dataclasses import dataclass
from torch import nn
from convince.fit.answer import Answer
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import RunSpec

CARD = Card(
    part="committee",
    kind="technique",
    title="Committee",
    claims=("answer",),
)


class Mean(nn.Module):
    def __init__(self, answers):
        super().__init__()
        self.answers = nn.ModuleList(answers)

    def forward(self, x):
        return torch.stack([answer(x) for answer in self.answers]).mean(0)


@dataclass
class Committee(Technique):
    """The mean of the scores."""

    others: int = 2

    def fit_members(self, run):
        return [RunSpec({"seed": run.seed + 1 + i}) for i in range(self.others)]

    def answer(self, run):
        return Mean([Answer(run.normalise, run.model), *run.members])
'''


@pytest.fixture
def committee(tmp_path):
    known = list(parts._own)
    path = tmp_path / "committee.py"
    path.write_text(COMMITTEE)
    parts.add_path(path)
    yield "committee"
    parts._own[:] = known
    parts.find.cache_clear()


CHOSEN = {"model": "small-cnn:widths=(4,)", "batch": 8, "epochs": 1, "augment": "none", "precision": "fp32", "checkpoint_seconds": 0}


def test_members_are_trained_stored_and_loaded(committee, tmp_path):
    data = tiny_images()
    result = train(settings(**CHOSEN, parts=(committee,)), data, folder=tmp_path / "run")
    x = data.x.take(data.split.test)
    assert isinstance(result.answer, nn.Module)
    assert len(result.run.members) == 2
    alone = train(settings(**CHOSEN, seed=1), data)
    assert torch.equal(result.run.members[0](x.float() / 255), alone.answer(x.float() / 255)), "a member is the run of its own settings"
    loaded = open_run(tmp_path / "run", trust=True)
    assert torch.equal(loaded.logits(x), result.answer(x.float() / 255))
    assert result.run.images == 3 * 32


def test_a_finished_member_is_not_trained_again(committee, tmp_path):
    from convince.fit.loop import fit

    data, path = tiny_images(), tmp_path / "checkpoint.safetensors"
    whole = prepare(settings(**CHOSEN, parts=(committee,)), data)
    fit(whole)
    steps = []

    def stop(done, total, text):
        steps.append(text)
        if len(steps) == 6:  # in the second member
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(prepare(settings(**CHOSEN, parts=(committee,)), data), path, stop)
    steps.clear()
    again = prepare(settings(**CHOSEN, parts=(committee,)), data)
    fit(again, path, lambda *words: steps.append(words))
    assert len(steps) == 4 + 2, "steps already done were done again"
    x = data.x.take(data.split.test).float() / 255
    assert torch.equal(whole.answer.eval()(x), again.answer.eval()(x))
