"""Several hosts: mistakes in a host file, and a run over ssh between two hosts that is the run of one."""

import json

import pytest

from launch import hosts
from oat_dist.errors import UserError
from tests.launch.commands import ROOT, environment, only_run, require_same, run
from tests.namespaces import ADDRESSES, two_hosts, why_not

TRAIN = ["launch/train.py", "--config", str(ROOT / "launch/configs/digits.yaml")]
needs_hosts = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.parametrize(
    ("content", "message"),
    [("a slots=1\nb slots=1\na slots=2\n", "line 3: host a stands there twice; add its slots"),
     ("# a slots=1\n\n", "names no host; write lines `HOST slots=N`"),
     ("a\n", "line 1: 'a': must be `HOST slots=N` with N at least 1"),
     ("a slots=0\n", "line 1: 'a slots=0': must be"),
     ("-oProxyCommand=x slots=1\n", "line 1: '-oProxyCommand=x slots=1': must be"),
     ("-x slots=1\n", "line 1: '-x slots=1': must be"),
     ("a;b slots=1\n", "line 1: 'a;b slots=1': must be"),
     (None, "No such file or directory")],
)  # fmt: skip
def test_a_mistake_in_a_host_file_is_named_with_its_line(content, message, tmp_path):
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        hosts.main(["--hostfile", str(path), *TRAIN])
    assert str(error.value).startswith(f"--hostfile {path}: {message}")


def test_processes_that_do_not_share_the_batch_evenly_are_refused_with_the_nearest_numbers(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=4\nb slots=2 # smaller\n")
    with pytest.raises(UserError) as error:
        hosts.main(["--hostfile", str(path), *TRAIN])
    expected = "optim.batch_size=128: 2 hosts with 4 + 2 processes = 6 do not divide it; 4 and 8 processes do, or "
    assert str(error.value) == expected + "optim.batch_size=126 and 132 with these"


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    with two_hosts(folder) as both:
        path = folder / "hosts"
        path.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        env = environment()
        yield both, path, {**env, "PATH": f"{both.bin}:{env['PATH']}", "PYTHONPATH": str(ROOT)}


@needs_hosts
def test_a_host_that_does_not_answer_is_named(network, tmp_path):
    both, path, env = network
    wrong = tmp_path / "hosts"
    wrong.write_text(path.read_text() + "10.213.77.3 slots=2\n")
    done = run(*both.enter, "python", "launch/hosts.py", "--hostfile", str(wrong), *TRAIN, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: --hostfile {wrong}: host 10.213.77.3 is not reachable: ssh: connect")


@pytest.mark.slow
@pytest.mark.dist
@needs_hosts
def test_a_run_on_two_hosts_is_the_run_of_two_processes_on_one(network, short, two_processes, tmp_path):
    both, path, env = network
    args = ["launch/train.py", *short, f"--output_dir={tmp_path}"]
    done = run(*both.enter, "python", "launch/hosts.py", "--hostfile", str(path), *args, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((only_run(tmp_path) / "provenance.json").read_text())["ranks"] == 2
    require_same(only_run(tmp_path), two_processes)
