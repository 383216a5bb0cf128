import pytest

from hasten.accel.errors import UserError
from hasten.accel.models.checkpoint import resolve
from hasten.jobs.bench import passes
from hasten.jobs.bench.processes.passes import measure


def result(instructions, seconds, kernel_chosen=True):
    return {"instructions": instructions, "seconds": seconds, "kernel_chosen": kernel_chosen}


RESULTS = {
    "native": result(
        "AVX512",
        {
            "kernel": {"1": 0.016, "64": 0.2, "prompt": 1.4},
            "torch": {"1": 0.048, "64": 0.3, "prompt": 1.5},
            "transformers": {"prompt": 1.6},
        },
    ),
    "avx2": result(
        "AVX2",
        {
            "kernel": {"1": 0.06, "64": 0.3, "prompt": 1.4},
            "torch": {"1": 0.05, "64": 0.3, "prompt": 1.4},
            "transformers": {"prompt": 1.4},
        },
        kernel_chosen=False,
    ),
}


def test_there_is_a_row_for_every_kind_of_processor_and_product():
    text = passes._section(passes.Config(tokens=[1, 64]), RESULTS)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == "| instructions | products | 1 | 64 | prompt of 512 |"
    assert rows[3:6] == [
        "| AVX512 | hasten with torch.mm | 48.0 | 300.0 | 1500.0 |",
        "| AVX512 | transformers |  |  | 1600.0 |",
        "| AVX2 | hasten | 60.0 | 300.0 | 1400.0 |",
    ]
    assert "On AVX2 hasten uses torch's products" in text
    assert "On AVX512" not in text


def test_speeds_are_those_over_torch_and_for_a_prompt_over_transformers():
    metrics = passes._metrics(RESULTS)
    assert metrics["native_1_over_torch"] == pytest.approx(3.0)
    assert metrics["native_prompt_over_transformers"] == pytest.approx(1.6 / 1.4)
    assert metrics["avx2_1_over_torch"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"instructions": ["sse9"]}, "instructions=sse9 is none of native, avx2"),
        ({"tokens": []}, "tokens="),
        ({"tokens": [0, 4]}, "tokens="),
        ({"tokens": [600]}, "prompt=512"),
    ],
    ids=str,
)
def test_a_mistake_is_told_before_anything_starts(options, words):
    with pytest.raises(UserError, match=words):
        passes.run(passes.Config(**options))


def test_all_products_are_timed_after_their_outputs_were_compared():
    found = measure(resolve("embedded:target"), [1, 3], 5)
    assert {name: set(seconds) for name, seconds in found["seconds"].items()} == {
        "kernel": {"1", "3", "prompt"},
        "torch": {"1", "3", "prompt"},
        "transformers": {"prompt"},
    }
    assert all(value > 0 for seconds in found["seconds"].values() for value in seconds.values())
