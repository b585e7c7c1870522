"""The ids that stand for an image in a text, of both releases of SGLang."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kara_sglang.radix_integration.padding import padding_values


@pytest.mark.parametrize(
    ("item", "ids"),
    [
        ({"pad_value": 7}, [7]),  # 0.5.22
        ({"pad_value": 7, "pad_values": None}, [7]),
        ({"pad_value": 7, "pad_values": []}, [7]),
        ({"pad_value": 7, "pad_values": [8, 9]}, [8, 9]),
    ],
)
def test_all_ids_of_an_image(item: dict, ids: list[int]) -> None:
    assert list(padding_values(SimpleNamespace(**item))) == ids


def test_sglangs_own_item_says_them() -> None:
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

    image = MultimodalDataItem(modality=Modality.IMAGE)
    image.set_hash(1234)
    assert set(image.padding_sequence(6)) <= set(padding_values(image))
