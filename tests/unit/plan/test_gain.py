"""The projection: that of the benchmarks, and none where no datasheet says enough."""

from __future__ import annotations

import json

import pytest
from models import QWEN3_8B
from planned import LOAD, planned

from kara_sglang.benchmarks.models import MODELS
from kara_sglang.benchmarks.serving.projection import CARDS, Counted
from kara_sglang.config import KaraConfig
from kara_sglang.plan import gain
from kara_sglang.plan.command import main
from kara_sglang.plan.load import Held, Load, compressed


@pytest.mark.parametrize("retain", [None, 0.5])
def test_the_projection_is_that_of_the_benchmarks(retain, monkeypatch):
    """One steady batch, as a counted schedule and as a load."""
    from kara_sglang.benchmarks.arithmetic import Settings
    from kara_sglang.benchmarks.serving import projection

    monkeypatch.setattr(projection, "ring_bytes", lambda *_: 0)  # the plan takes it out beforehand
    model, card, load = MODELS[0], CARDS[1], Load(1000, 8000, 30)
    held = Held(most=9000, mean=5000.0, windows=0)
    settings = None
    if retain is not None:
        held = compressed(load, KaraConfig(window=512, delay=64), 1)
        settings = Settings(window=512, kept=256, delay=64, mean=True)
    pool = card.pool(model)
    counted = Counted(
        fits=pool / 9000,
        pool=pool,
        requests=30,
        prompt=1000,
        output=8000,
        window=512,
        delay=64,
        retain=retain,
        schedule={30: (8000, 8000 * 30 * held.mean)},
    )
    ours = gain.rate(model, card, load, held, int(pool), settings)
    assert ours == pytest.approx(counted.rate(model, card, 8000), rel=1e-9)


def test_what_has_no_datasheet_is_not_projected(qwen, tmp_path, capsys):
    assert planned(capsys, "--model", qwen, "--gpu-memory", "80", *LOAD)["projection"]["gain"] > 1.3
    cpu = ("--device", "cpu", "--max-total-tokens", "65536")
    assert planned(capsys, "--model", qwen, *LOAD, *cpu)["projection"] is None
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B | {"quantization_config": fp8}))
    words = ("--model", str(tmp_path), "--gpu-memory", "80", *LOAD)
    assert main(list(words)) == 2
    assert "--weights-gb" in capsys.readouterr().err
    assert planned(capsys, *words, "--weights-gb", "8.2")["projection"] is None
