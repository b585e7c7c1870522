"""docs/deployment.md and the files beside it: commands, flags and figures are the code's."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from models import QWEN3_8B
from places import ROOT

from kara_sglang import top
from kara_sglang.plan import command as plan
from kara_sglang.plan.launch import parser

PAGE = ROOT / "docs" / "deployment.md"
DEPLOY = ROOT / "docs" / "deploy"
LAUNCH = ["-m", "sglang.launch_server"]


def test_the_plan_on_the_page_is_what_its_command_prints(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    program, *arguments = re.findall(r"^python -m (kara_sglang\.plan) (.*)$", PAGE.read_text(), re.M)[0]
    assert program == "kara_sglang.plan"
    words = shlex.split(arguments[0])
    model = words[words.index("--model") + 1]
    words[words.index(model)] = str(tmp_path)
    assert plan.main(words) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path), model)
    page = PAGE.read_text().split("<!-- plan -->\n```\n", 1)[1].split("```", 1)[0]
    assert page == printed


def commands() -> dict[str, list[str]]:
    """Arguments of SGLang's server in each file."""
    unit = (DEPLOY / "kara-sglang.service").read_text().replace("\\\n", " ")
    started = shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1])
    file = (DEPLOY / "Containerfile").read_text()
    images = [json.loads(words) for words in re.findall(r"^ENTRYPOINT (.*)$", file, re.MULTILINE)]
    gpu = images[0]
    deployment, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    runs = re.findall(r"^docker run .*$", PAGE.read_text(), re.MULTILINE)
    behind = [shlex.split(line.split("kara-sglang:0.1.0", 1)[1]) for line in runs]
    assert started[1:3] == gpu[1:3] == LAUNCH and len(images) == 2 and len(behind) == 1
    return {
        "systemd": started[3:],
        "docker": gpu[3:] + behind[0],
        "docker without": gpu[3:] + behind[0] + ["--kv-compress", "none"],
        "kubernetes": gpu[3:] + container["args"],
    }


@pytest.mark.parametrize("where", ["systemd", "docker", "docker without", "kubernetes"])
def test_sglang_takes_the_flags_of_the_examples(where: str) -> None:
    read = parser().parse_args(commands()[where])
    assert read.model_path.endswith("/Qwen3-8B") and read.port == 30000
    assert read.kv_compress == ("none" if where == "docker without" else "kara")


def test_the_image_is_the_one_that_kubernetes_runs() -> None:
    from kara_sglang import __version__

    image = f"kara-sglang:{__version__}"
    assert f"image: {image} " in (DEPLOY / "kubernetes.yaml").read_text()
    assert PAGE.read_text().count(image) == 2


def test_the_view_on_the_page_is_a_frame() -> None:
    state = {
        "settings": {
            **{"selector": "kara", "kept": 32, "window": 64, "delay": 16},
            **{"policy": "periodic", "prefix_reuse": "auto"},
        },
        "compression": "compression begins when an answer is longer than 80 tokens; "
        "it has, 6 windows so far",
        **{"running_requests": 4, "waiting_requests": 0, "largest_decode_graph": 0},
        **{"pool_tokens": 8192, "pool_tokens_free": 7000, "pool_tokens_evictable": 616},
        **{"running_held_tokens": 536, "running_logical_tokens": 728},
        **{"recorders_in_use": 3, "recorder_pages_free": 700, "without_queries": 0},
        "skipped": {"opt_out": 1},
    }

    def look(seconds: float, **counts: float) -> top.Sample:
        rank = {"last_gen_throughput": 66.97, "kv_compress": state | counts}
        return top.Sample.of({"internal_states": [rank]}, seconds)

    before = look(0.0, windows=3, passes=3, slots_freed=96, pass_seconds=0.03)
    sample = look(2.197, windows=6, passes=6, slots_freed=192, pass_seconds=0.05)
    first, *others = top.frame("http://127.0.0.1:30000", sample, before)
    page = PAGE.read_text().split(f"```\n{first[:22]}", 1)[1].split("\n```", 1)[0].splitlines()
    assert page[1:] == others


def test_the_dashboards_panels_are_described_and_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 10
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
