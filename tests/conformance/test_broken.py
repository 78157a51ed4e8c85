"""The checks are tested too: one deliberately broken part a check, which must fail it; and good parts that pass all."""

import pytest
from good_parts import GOOD

from convince.checks import checks_of, run_check
from convince.checks.subject import Subject, tiny_images
from convince.parts import Part, add_path, find, read

# (kind, check): (line of the good part, what stands there in the broken one)
BROKEN = {
    ("technique", "card is whole"): ('title="Shrink"', 'title="Shrink", paper="shrink"'),
    ("technique", "file opens with a sentence"): ('"""Shrink: pull the weights a little towards zero after each step."""', '"""Shrink."""'),
    ("technique", "options have defaults"): ("rate: float = 0.01", "rate: float"),
    ("technique", "wrong option is named"): ("rate: float = 0.01", "rate: float = 0.01\n    no_such_option: int = 1"),
    ("technique", "constructor only stores"): ("rate: float = 0.01", "rate: float = 0.01\n\n    def __post_init__(self):\n        self.x = torch.rand(1)"),
    ("technique", "claims are its slots"): ("def state(self)", "def update(self, run):\n        run.optimizer.step()\n\n    def state(self)"),
    ("technique", "same seed same bits"): ("p.mul_(1 - self.rate)", "p.mul_(1 - self.rate * (0.5 + torch.rand((), generator=NOISE)))"),
    ("technique", "global random state is put back"): ("rate: float = 0.01", "rate: float = 0.01\n\n    def __post_init__(self):\n        torch.rand(1)"),
    ("technique", "inputs are unchanged"): ("self.seen += 1", "self.seen += 1\n        run.data.y[0] = 1"),
    ("technique", "off is the baseline"): ("p.mul_(1 - self.rate)", "p.mul_(0.999 - self.rate)"),
    ("technique", "on is not the baseline"): ("p.mul_(1 - self.rate)", "p.mul_(1)"),
    ("technique", "every parameter gets a gradient"): ("def on_step(self, run):", "def around_grad(self, run, grad):\n        grad()\n        run.model.fc.bias.grad = None\n\n    def on_step(self, run):"),
    ("technique", "old names survive"): ("self.seen = 0\n\n    def on_step", "self.seen = 0\n        run.model.head, run.model.fc = run.model.fc, nn.Identity()\n        run.model.forward_head = lambda f: run.model.head(f.mean((2, 3)))\n\n    def on_step"),
    ("technique", "resume gives the same bits"): ("p.mul_(1 - self.rate)", "p.mul_(1 - self.rate / (1 + self.tick))\n        self.tick += 1"),
    ("technique", "reload gives the same answer"): ("def state(self)", "def wrap(self, answer):\n        return Scaled(answer, getattr(self, 'seen', 0))\n\n    def state(self)"),
    ("technique", "double precision works"): ("p.mul_(1 - self.rate)", "p.data = (p * (1 - self.rate)).float()"),
    ("loss", "reductions agree"): ('"sum": rows.sum()', '"sum": rows.mean()'),
    ("loss", "gradient is right"): ("logits.log_softmax(1)", "(logits.detach() * 0.5 + logits * 0.5).log_softmax(1)"),
    ("loss", "loss leaves its inputs"): ("rows = -(y *", "logits.data.mul_(2)\n        rows = -(y *"),
    ("loss", "right answers cost less"): ("rows = -(y", "rows = (y"),
    ("augmentation", "shapes and ranges are kept"): ("1 - self.by *", "1 + self.by *"),
    ("augmentation", "randomness is handed in"): ("generator=gen", ""),
    ("augmentation", "batch is unchanged"): ("return x * light.to(x), y", "return x.mul_(light.to(x)), y"),
    ("backbone", "interface is timms"): ("return x if pre_logits else self.fc(x)", "return self.fc(x)"),
    ("backbone", "channels are an argument"): ("nn.Conv2d(in_chans,", "nn.Conv2d(2,"),
    ("backbone", "every weight gets a gradient"): ("self.bn = ", "self.unused = nn.Parameter(torch.zeros(2))\n        self.bn = "),
    ("backbone", "rows do not mix in eval"): ("return self.bn(self.conv(x)).relu()", "return (self.bn(self.conv(x)) - self.conv(x).mean(0, keepdim=True)).relu()"),
    ("backbone", "weights go by name"): ("self.fc = nn.Linear(width, num_classes)", "self.fc = nn.Linear(width, num_classes)\n        for p in self.parameters():\n            nn.init.constant_(p, 0.1)"),
    ("backbone", "double precision is kept"): ("x = x.mean((2, 3))\n", "x = x.mean((2, 3)).float()\n        self.fc.float()\n"),
    ("backbone", "sizes can be built"): ('"width": 16}', '"width": -16}'),
    ("backbone", "counts are the published ones"): ('"parameters": 16 * 28', '"parameters": 15 * 28'),
    ("backbone", "small sizes are small"): ("    small=(\"tiny-net\",),\n", ""),
    ("backbone", "sizes conform"): ("self.num_classes, self.num_features = num_classes, width", "self.num_classes, self.num_features = num_classes, min(width, 6)"),
    ("backbone", "other inputs work or are refused"): ("raise Mistake(", "raise RuntimeError("),
    ("backbone", "feature maps are named"): ('maps(("bn", width, 1))', 'maps(("bn", width + 1, 1))'),
    ("backbone", "timm can make it"): ("self.num_classes, self.num_features = num_classes, width", "self.num_classes, self.num_features = 10, width"),
    ("layer", "layer fits ours and timms"): ("types=(nn.Conv2d,), skip=skip", "types=(nn.Conv3d,), skip=skip"),
    ("layer", "layer is undone cleanly"): ('return attach(model, "damp", places, lambda name, conv: Damp())', 'done = attach(model, "damp", places, lambda name, conv: Damp())\n    done.steps.pop()\n    return done'),
    ("layer", "new weights get gradients"): ("return x * self.by", "return x * self.by.detach()"),
    ("layer", "layer is copied with the network"): ("lambda name, conv: Damp())", "lambda name, conv: Held(conv))"),
    ("layer", "start is unchanged"): ("torch.ones(())", "torch.full((), 0.5)"),
    ("explainer", "map fits the image"): ("(grad * x).sum(1, keepdim=True)", "(grad * x)[..., 1:].sum(1, keepdim=True)"),
    ("explainer", "target matters"): ("target[:, None]", "0 * target[:, None]"),
    ("explainer", "weights matter"): ("(grad * x)", "(0 * grad + x + target.view(-1, 1, 1, 1))"),
    ("explainer", "wrong target is named"): ("class Times(Explainer):", "class Times:"),
    ("explainer", "answer is left as found"): ("(grad,) = ", "answer.model.bn1.weight.data.mul_(1.01)\n        (grad,) = "),
    ("explainer", "answer is left as found after an exception"): ("scores = answer(x)", "answer.flag = torch.nn.Identity()\n        answer(x)\n        scores = answer(x)"),
    ("attack", "pixels stay valid"): ("return x +", "return torch.nan * x +"),
    ("attack", "attack stays in its ball"): ("class Sign(Attack):", "class Sign(Attack):\n    def __call__(self, answer, x, y, *, eps=None, norm='2'):\n        return self.perturb(answer, x.clone(), y, eps=(eps or 0.1) * 3, norm=norm).detach().clamp(0, 1)\n"),
    ("attack", "attack repeats"): ("grad.sign()", "(grad.sign() + torch.randn_like(grad))"),
    ("attack", "attack fools"): ("return x + (self.step if eps is None else eps) * grad.sign()", "return x + 0 * grad.sign()"),
    ("attack", "answer is left as found"): ("(grad,) = ", "answer.model.bn1.weight.data.mul_(1.01)\n        (grad,) = "),
    ("attack", "answer is left as found after an exception"): ("x.requires_grad_(True)", "x.requires_grad_(True)\n        answer.flag = torch.nn.Identity()\n        answer(x)"),
    ("predictor", "scores keep their shape"): ("/ 2", "/ 0"),
    ("predictor", "wrapping leaves the answer"): ("return Mirrored(answer)", "answer.model.fc.bias.data.add_(0.1)\n        return Mirrored(answer)"),
    ("predictor", "training is untouched"): ("return Mirrored(answer)", "answer.model.fc.bias.data.add_(0.1)\n        return Mirrored(answer)"),
    ("compressor", "result is smaller"): ("inner.weight.detach().half()", "inner.weight.detach().clone()"),
    ("compressor", "structure is json"): ('Cut({"name": "fc"})', 'Cut({"name": ("fc",)})'),
    ("compressor", "original is left alone"): ('return Cut({"name": "fc"})', 'answer.model.fc.bias.data.add_(0.1)\n        return Cut({"name": "fc"})'),
    ("probe", "readings are named numbers"): ('Reading("largest score"', 'Reading("mean score"'),
    ("probe", "there is something to look at"): ('[Bars("Scores", "", {r.name: r.value for r in readings})]', "[]"),
    ("probe", "riding leaves training alone"): ("scores = answer(x)", "scores = answer(x)\n            next(answer.parameters()).data.mul_(1.01)"),
    ("probe", "answer is left as found"): ("with as_found(answer), torch.no_grad():", "with torch.no_grad():\n            answer.eval()"),
    ("recipe", "schema names its fields"): (', Field("label", "the height of the bar")', ","),
    ("recipe", "sample repeats"): ("return tiny_images()", "import dataclasses\n        d = tiny_images()\n        return dataclasses.replace(d, y=d.y[torch.randperm(48, generator=NOISE)])"),
    ("recipe", "sample trains"): ('"lr": 0.01', '"lr": -1'),
    ("search", "search stays in its budget"): ("return lab.best()", "lab.spent = 2 * lab.budget\n        return lab.best()"),
    ("search", "search finds a network"): ("return lab.best()", "return {'widths': (4, 8)}"),
    ("search", "search repeats"): ("return lab.best()", "return {'widths': [2 + int(torch.randint(9, ())), 4]}"),
    ("search", "search goes on where it stopped"): ("return lab.best()", "lab.worked += 1\n        return lab.best()"),
    ("search", "random search stands beside"): ('lambda genes: {"widths": [genes["first"], genes["second"]]}', 'lambda genes: {"widthy": [genes["first"]]}'),
    ("search", "test part is never seen"): ("return lab.best()", "lab.data.split = DATA.split\n        return lab.best()"),
    ("search", "find is a card"): ("return lab.best()", "return {'widths': float('inf')}"),
    ("study", "study runs at a tiny budget"): ('{"rows": 48}', '{"rows": "many"}'),
}  # fmt: skip

EXTRAS = """
NOISE = torch.Generator().manual_seed(0)


class Scaled(nn.Module):
    def __init__(self, answer, by):
        super().__init__()
        self.answer, self.by = answer, by

    def forward(self, x):
        return self.answer(x) * (1 + self.by)
"""

HELD = """


class Held(Damp):
    def __init__(self, conv):
        super().__init__()
        self.kept = lambda: conv.weight

    def forward(self, x):
        return x * self.by + 0.1 * self.kept().mean()

"""


@pytest.fixture
def written(tmp_path):
    """Writes a part's source and makes it known for the length of a test."""
    from convince import parts

    known = list(parts._own)

    def write(source: str, name: str) -> Part:
        path = tmp_path / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        add_path(path)
        part = read(path)
        assert isinstance(part, Part), part
        return part

    yield write
    parts._own[:] = known
    find.cache_clear()
    tiny_images.cache_clear()  # a broken part may have changed it


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_part_passes_every_check(kind, written):
    subject = Subject(written(GOOD[kind], f"good_{kind}"))
    outcomes = [run_check(subject, name) for name in checks_of(kind)]
    assert [f"{o.check}: {o.reason}" for o in outcomes if o.outcome == "failed"] == []


@pytest.mark.parametrize(("kind", "check"), list(BROKEN), ids=lambda word: word.replace(" ", "-"))
def test_a_broken_part_fails_its_check(kind, check, written):
    old, new = BROKEN[kind, check]
    assert old in GOOD[kind], f"the good {kind} has no line {old!r}"
    source = GOOD[kind].replace(old, new)
    if "NOISE" in new or "Scaled" in new:
        source = source.replace("\n\n\n@dataclass", EXTRAS + "\n\n@dataclass", 1)
    if "DATA" in new:
        source = source.replace("\n\n\n@dataclass", "\n\n\nfrom convince.checks.subject import tiny_images\nDATA = tiny_images()\n\n\n@dataclass", 1)
    if "Held" in new:
        source = source.replace("\n\n\ndef install", HELD + "\n\ndef install", 1)
    if "self.tick" in new:
        source = source.replace("self.seen = 0\n\n    def on_step", "self.seen = 0\n        self.tick = 0\n\n    def on_step")
    if check == "reload gives the same answer":
        source = source.replace('return {"seen": self.seen}', "return {}")
    outcome = run_check(Subject(written(source, f"broken_{kind}")), check)
    assert outcome.outcome == "failed", f"the broken part gets away with it: {outcome}"


def test_every_check_has_a_broken_part():
    broken = {check for _, check in BROKEN}
    for kind in GOOD:
        for check in checks_of(kind):
            assert (kind, check) in BROKEN or check in broken, f"{kind}: no broken part fails {check!r}"
