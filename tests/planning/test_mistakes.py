"""A mistake, in the table or elsewhere, is an error that says what and where: never a wrong run."""

import copy
import re

import pytest
import torch
from torch import nn

import hairpin as hp
from hairpin.errors import (
    HairpinError,
    LayoutError,
    MemoryBudgetError,
    MeshError,
    OutputError,
    PlanError,
    SplitError,
    UnitError,
)
from planning.mistaken import ALONG_T, FRAMES
from planning.toys import ATTENDS, Along, Video, fixed

MESH = hp.Mesh(sp=4)
X = torch.zeros(2, FRAMES, 4, 4)
VIDEO = torch.zeros(2, 6, 5, 2)
STAGE = {"stage": "b t [s] c"}


class Staged(nn.Module):
    """One stage that the table lists."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x):
        return self.stage(x)


def plan(model=None, example=VIDEO, mesh=MESH, **words):
    words.setdefault("attends", ATTENDS)
    return hp.plan(Video() if model is None else model, example, mesh, **words)


@pytest.mark.parametrize("name", ALONG_T)
def test_a_stage_that_computes_along_a_dim_it_does_not_bracket(name):
    model = Staged(fixed(ALONG_T[name])())
    with pytest.raises(SplitError) as caught:
        plan(model, X, attends=STAGE, free_dims=("t",))
    message = str(caught.value)
    assert "module 'stage" in message
    assert "dim 't'" in message
    assert "[t]" in message


def test_the_innermost_module_is_named():
    model = Staged(nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"mix": Along(1)})["mix"]))
    with pytest.raises(
        SplitError, match=r"module 'stage\.1' cannot run on a part of dim 't'.*softmax"
    ):
        plan(model, X, attends=STAGE, free_dims=("t",))


def test_functional_dropout_in_a_split_stage():
    model = Staged(fixed(lambda self, x: torch.dropout(x, 0.1, self.training))())
    with pytest.raises(SplitError, match=r"random numbers of a split shape.*use nn\.Dropout"):
        plan(model, X, attends=STAGE, free_dims=("t",))
    assert plan(model.eval(), X, attends=STAGE, free_dims=("t",)).stages[0].held == "t"


def test_a_side_argument_that_carries_the_dim_and_is_not_listed():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return x * mask

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = Masked()

        def forward(self, x, mask):
            return self.stage(x, mask)

    example = (X, torch.zeros(2, FRAMES, 4, 1))
    with pytest.raises(SplitError, match=r"module 'stage'.*dim 't'.*hp\.Seam\(args="):
        plan(Model(), example, attends=STAGE, free_dims=("t",))
    seam = hp.Seam("b t [s] c", args={"mask": "b t s 1"})
    assert plan(Model(), example, attends={"stage": seam}, free_dims=("t",)).stages[0].held == "t"


TABLE_MISTAKES = {
    "an empty table": ({}, "the attends table is empty"),
    "matches nothing": (
        {"block.*.spacial": "b t [s] c"},
        r"'block\.\*\.spacial' matches no module or parameter; the nearest are blocks\.\*\.spatial",
    ),
    "listed twice": (
        {**ATTENDS, "blocks.0.*": "b t [s] c"},
        r"module 'blocks\.0\.spatial' is matched by 'blocks\.\*\.spatial' and by 'blocks\.0\.\*'",
    ),
    "nested": (
        {**ATTENDS, "blocks.0": "b t s c"},
        r"module 'blocks\.0\.spatial' lies inside 'blocks\.0', which is listed too",
    ),
    "an axis": ({**ATTENDS, "head": "b t/sp s c"}, r"'head' has 'b t/sp s c'; leave out '/axis'"),
    "an axis of an argument": (
        {**ATTENDS, "head": hp.Seam("b t s c", args={"x": "b/sp"})},
        "leave out '/axis'",
    ),
    "a missing dim": (
        {**ATTENDS, "blocks.*.spatial": "t [s] c"},
        r"module 'blocks\.0\.spatial' has shape \(2, 6, 5, 4\), 4 dims.*'t \[s\] c' has 3",
    ),
    "a dim too many": (
        {**ATTENDS, "head": "b t h w c -> b t h w v"},
        r"module 'head' has shape \(2, 6, 5, 4\), 4 dims.*has 5",
    ),
    "contradictory sizes": (
        {**ATTENDS, "blocks.*.temporal": "b [s] t c"},
        r"module 'blocks\.0\.temporal'.*a dim of length 6 cannot be s with s=5",
    ),
    "channels that change": (
        {**ATTENDS, "head": "b t s c"},
        r"output 0 of module 'head'.*length 2 cannot be c",
    ),
    "a merged dim not determined": (
        {"blocks.*.spatial": "(b t k) x [s] c"},
        r"name the model's own arguments too|4 dims",
    ),
    "an unbalanced bracket": ({**ATTENDS, "head": "b t [s c"}, r"'b t \[s c'"),
    "a dim twice": ({**ATTENDS, "head": "b t t c"}, "dim 't' is used twice"),
    "a value of a wrong type": (
        {**ATTENDS, "head": 7},
        "the value of 'head' is 7; write a pattern",
    ),
    "an unknown field": (
        {**ATTENDS, "head": {"stream": "b t s c", "outs": 1}},
        "a mapping with keys among",
    ),
    "an argument of the model that is none": (
        {"": {"frames": "b t s v"}, **ATTENDS},
        "names argument 'frames' of the model; its tensor arguments are x",
    ),
    "inputs that are no mapping": (
        {"": "b t s v", **ATTENDS},
        "it names the model's own arguments",
    ),
    "a stream that is no argument": (
        {**ATTENDS, "head": hp.Seam("b t s c", out="b t s v", stream_arg="hidden")},
        r"module 'head': argument 'hidden', named as its stream, is not a tensor",
    ),
    "more outputs than there are": (
        {**ATTENDS, "head": hp.Seam("b t s c", out=("b t s v", "b t"))},
        r"'head'.*(gave 1|names 2)",
    ),
    "a tensor of another rank": (
        {**ATTENDS, "embed.weight": "1 t v"},
        r"embed\.weight.*(2|3)",
    ),
}


@pytest.mark.parametrize("name", TABLE_MISTAKES)
def test_mistakes_in_the_table(name):
    table, message = TABLE_MISTAKES[name]
    with pytest.raises((PlanError, LayoutError)) as caught:
        plan(attends=table)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_bare_dims():
    dims = {"blocks.*.spatial": "s", "blocks.*.temporal": "t"}
    short = plan(attends={**dims, "head": "b t s c -> b t s v"}, dims="b t s c")
    assert short == plan()
    with pytest.raises(PlanError, match=r"computes along 'z', which is not in dims='b t s c'"):
        plan(attends={"blocks.*.spatial": "z"}, dims="b t s c")
    with pytest.raises(HairpinError, match=r"blocks\.0\.spatial"):
        plan(attends=dims)


@pytest.mark.parametrize("example", [7, "video", None, {1, 2}])
def test_an_example_of_a_wrong_type(example):
    with pytest.raises(PlanError, match=r"example is a (int|str|NoneType|set); give a tensor"):
        plan(example=example)


def test_examples_in_every_form():
    plans = [plan(example=e) for e in (VIDEO, (VIDEO,), [VIDEO], {"x": VIDEO}, ((VIDEO,), {}))]
    assert all(p == plans[0] for p in plans)


def test_an_example_that_the_model_does_not_run():
    with pytest.raises(
        PlanError, match=r"Video failed on the example, in module 'embed'.*Give one"
    ):
        plan(example=torch.zeros(2, 6, 5, 3))
    with pytest.raises(PlanError, match="Video failed on the example"):
        plan(example=(VIDEO, VIDEO))


def test_unknown_free_dims():
    with pytest.raises(
        PlanError,
        match="free_dims names 'w', which no pattern of the table has; its dims are b, t, s",
    ):
        plan(free_dims=("w",))


def test_nothing_can_be_split():
    model = Staged(Along(1))
    with pytest.raises(PlanError, match=r"no stage of Staged can be split over 4 ranks.*free_dims"):
        plan(model, X, attends={"stage": "b [t] [s] c"})
    with pytest.raises(PlanError, match="can be split"):
        plan(example=torch.zeros(2, 1, 1, 2))


def test_memory():
    needed = plan().peak_bytes
    assert plan(memory=needed).peak_bytes == needed
    with pytest.raises(MemoryBudgetError, match="100 B"):
        plan(memory="100 B")
    with pytest.raises(UnitError, match="2 apples"):
        plan(memory="2 apples")


def test_a_mesh_without_the_axis():
    with pytest.raises(MeshError, match=r"Mesh\(dp=4\) has no axis 'sp'; name one of dp"):
        plan(mesh=hp.Mesh(dp=4))
    assert plan(mesh=hp.Mesh(dp=2, cp=4), axis="cp").axis == "cp"


def test_a_plan_for_another_model():
    made = plan(mesh=hp.Mesh(sp=1))
    with pytest.raises(
        PlanError, match=r"names module 'blocks\.1.spatial', which Video does not have"
    ):
        hp.parallelize(Video(depth=1), made)
    with pytest.raises(PlanError, match="a Video of another structure"):
        hp.parallelize(Video(depth=3), made)
    with pytest.raises(
        PlanError, match=r"made for Video and names module 'blocks\.0.spatial', which Linear"
    ):
        hp.parallelize(nn.Linear(2, 2), made)


def test_a_plan_for_another_degree():
    with pytest.raises(PlanError, match="splits over 4 ranks of axis 'sp', the mesh has 1 there"):
        hp.parallelize(Video(), plan())
    with pytest.raises(MeshError, match="no axis 'sp'"):
        hp.parallelize(Video(), plan(), hp.Mesh(dp=4))
    with pytest.raises(MeshError, match="only a description"):
        hp.parallelize(Video(), plan(), MESH)


def test_a_refused_plan_leaves_the_model_alone():
    model = Video()
    before = set(dir(model.blocks[0].spatial)), len(model._forward_pre_hooks)
    for mesh in (hp.Mesh(dp=4), MESH, None):
        with pytest.raises(HairpinError):
            hp.parallelize(model, plan(model), mesh)
    bad = Staged(fixed(ALONG_T["softmax"])())
    with pytest.raises(SplitError):
        plan(bad, X, attends=STAGE, free_dims=("t",))
    for module in [*model.modules(), *bad.modules()]:
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert (set(dir(model.blocks[0].spatial)), len(model._forward_pre_hooks)) == before


def test_a_model_that_already_carries_a_plan():
    model = Video()
    made = plan(model, mesh=hp.Mesh(sp=1))
    hp.parallelize(model, made)
    with pytest.raises(
        PlanError, match=r"this Video already carries a plan; call hp\.detach\(model\) first"
    ):
        hp.parallelize(model, made)
    with pytest.raises(PlanError, match=r"already carries a plan"):
        plan(model)
    assert hp.plan_of(model) == made


def test_a_part_of_a_model_that_already_carries_a_plan():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.video = Video()

        def forward(self, x):
            return self.video(x)

    model = Outer()
    hp.parallelize(model.video, plan(model.video, mesh=hp.Mesh(sp=1)))
    table = {f"video.{key}": value for key, value in ATTENDS.items()}
    with pytest.raises(PlanError, match=r"video.*already carries a plan"):
        hp.parallelize(model, plan(copy.deepcopy(Outer()), mesh=hp.Mesh(sp=1), attends=table))


def test_planned_in_eval_and_run_in_train():
    model = Video(drop=0.1).eval()
    hp.parallelize(model, plan(model, mesh=hp.Mesh(sp=1)))
    model(VIDEO)
    with pytest.raises(
        PlanError, match=r"this Video is in train\(\) but its plan was made in eval\(\)"
    ):
        model.train()(VIDEO)
    model.eval()(VIDEO)


def test_an_input_of_another_rank_than_planned():
    table = {"": {"x": "b t s v"}, **ATTENDS}
    model = Video()
    hp.parallelize(model, plan(model, mesh=hp.Mesh(sp=1), attends=table))
    with pytest.raises(PlanError, match=r"argument 'x' of the model has shape \(6, 5, 2\), 3 dims"):
        model(VIDEO[0])


def test_a_meta_device_model():
    with torch.device("meta"):
        model = Video(depth=3)
    assert plan(model).stages == plan(Video(depth=3)).stages

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Linear(4, 4)

        def forward(self, x):
            if x.sum() > 0:
                x = x + 1
            return self.stage(x)

    with torch.device("meta"):
        model = Reads()
    with pytest.raises(
        PlanError, match=r"Reads reads values of its input.*build it with real parameters"
    ):
        plan(model, X, attends=STAGE, free_dims=("t",))
    assert plan(Reads(), X, attends=STAGE, free_dims=("t",)).stages[0].held == "t"


def test_planning_costs_no_memory():
    with torch.device("meta"):
        model = Video()
    huge = torch.empty(64, 4096, 4096, 2, device="meta")
    assert plan(model, huge).whole_peak_bytes > 2**36


def test_an_output_that_stays_split():
    class Leaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Along(2)
            self.second = Along(2)

        def forward(self, x):
            y = self.first(x)
            return self.second(y), y

    table = {"first": "b t [s] c", "second": "b t [s] c"}
    with pytest.raises(PlanError, match="the model's output keeps the split shape"):
        plan(Leaks(), X, attends=table, free_dims=("t",))


def test_none_of_the_listed_modules_runs():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Linear(4, 4)

        def forward(self, x):
            return x + 1

    with pytest.raises(PlanError, match="no listed module ran: stage"):
        plan(Idle(), X, attends=STAGE, free_dims=("t",))


def test_files(tmp_path):
    made = plan()
    with pytest.raises(
        OutputError, match=r"cannot write the plan to .*no/plan\.toml: No such file"
    ):
        made.save(tmp_path / "no" / "plan.toml")
    with pytest.raises(OutputError, match="cannot write the plan"):
        made.save(tmp_path)
    with pytest.raises(PlanError, match="cannot read a plan from"):
        hp.Plan.load(tmp_path / "none.toml")
    with pytest.raises(PlanError, match="cannot read a plan from"):
        hp.Plan.load(tmp_path)
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read a plan from"):
        hp.Plan.load(path)


def test_corrupt_and_old_toml():
    text = plan().to_toml()
    spoiled = {
        "not valid TOML": text[:-20] + '"',
        "version 0, this Hairpin reads version": text.replace("version = 2", "version = 0"),
        "version None": text.replace("version = 2\n", ""),
        "not a whole plan": text.replace("degree = 4\n", ""),
        "not a whole plan.*surplus": text.replace("degree = 4\n", "degree = 4\nsurplus = 1\n"),
        "not a whole plan.*what": text.replace('what = "stream"\n', "", 1),
        "plan": "",
        "plan ": "hello = 1",
    }
    for message, content in spoiled.items():
        with pytest.raises(PlanError, match=message.strip()):
            hp.Plan.from_toml(content)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("degree = 4", 'degree = "four"'),
        ("degree = 4", "degree = 0"),
        ("training = true", 'training = "yes"'),
        ('held = "t"', 'held = "z"'),
        ('held = "t"', "held = 3"),
        ('stream = "b t [s] c"', 'stream = "b t [s"'),
        ('stream = "b t [s] c"', "stream = 5"),
        ("[[stages]]", "[[stages]]\nstray = 1"),
        ('model = "Video"', "model = []"),
    ],
)
def test_toml_with_a_wrong_value(old, new):
    text = plan().to_toml()
    assert old in text
    with pytest.raises(HairpinError):
        hp.Plan.from_toml(text.replace(old, new, 1))
