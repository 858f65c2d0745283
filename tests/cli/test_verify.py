"""`hairpin verify fold` over several ranks."""

from hairpin.run.verify import shipped

FILES = {path.stem: path for path in shipped()}


def test_the_command_prints_one_verdict(run):
    oracle = FILES["evoformer_modules"]
    done = run("verify", "fold", "--oracle", oracle, "--ranks", 2, "--product", "ring")
    assert done.code == 0, done.err
    assert done.out.count("Evoformer modules, 0 recycles, over 2 ranks") == 1
    assert done.out.count("PASS") == 15


def test_a_way_that_does_not_exist(run):
    done = run("verify", "fold", "--ranks", 2, "--product", "teleport")
    assert (done.code, done.out) == (2, "")
    assert "product='teleport': write one of gather, ring, channels" in done.err
