"""Speculative decoding: every drafter and verifier in conf, on both targets, against transformers' own `generate`."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from hasten.accel.decoding.drafters.base import Models
from hasten.accel.decoding.engine import Engine, Request
from hasten.accel.decoding.lengths.fixed import Fixed
from hasten.accel.decoding.sampling import Sampling
from hasten.accel.decoding.targets import matmul
from hasten.accel.decoding.targets.families import build_decoder
from hasten.accel.decoding.targets.families.weights import ModelWeights
from hasten.accel.decoding.targets.fast import FastTarget
from hasten.accel.decoding.targets.graphs import CudaGraphs
from hasten.accel.decoding.targets.loading import load_target
from hasten.accel.decoding.ties import check_ties
from hasten.accel.decoding.verifiers.sample_and_match import SampleAndMatch
from hasten.accel.models import embedded
from hasten.kernels.rms_norm import reference
from tests.decoding.targets.kernel_passes import MODELS, again, check
from tests.decoding.targets.tape import tape
from tests.gpu.catalogue import build, configs
from tests.models import tiny

pytestmark = pytest.mark.gpu

TEXTS = [
    "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef write(path",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def",
    "for name in names:\n    print(name)\n",
]
NEW_TOKENS = 32
# Heads on the target are trained first, and have tests of their own.
DRAFTERS = [config for config in configs("drafter") if not build(config).reads_target]
VERIFIERS = configs("verifier")


@pytest.fixture(scope="module", autouse=True)
def uninterpreted(device):
    """On a CPU, texts are decoded without Triton's interpreter, in which one token takes a second.

    Norms are torch's, as on a GPU: the tape that stands in for CUDA graphs records torch's operations.
    """
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.delenv("TRITON_INTERPRET")
            patch.setattr(matmul, "rms_norm", reference.rms_norm)
        yield


@pytest.fixture(scope="module")
def prompts(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def generated(folder, prompts, device):
    """Token ids by transformers' greedy decoding in float32 on the device."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


@pytest.fixture(scope="module", params=["fast", "transformers"])
def target(request, folder, device):
    return load_target(folder, torch.float32, device, path=request.param)


@pytest.fixture(scope="module")
def models(device):
    """The embedded draft model; the head that was trained for it lies in its folder."""
    draft = load_target(embedded.path("draft"), torch.float32, device, keeps_hidden=True)
    return Models(draft.vocabulary, lambda: draft, embedded.path("draft"))


def decoded(target, prompts, drafter=None, verifier=None, models=None, sampling=None, in_flight=1, nodes=8):
    """Ids decoded for each prompt."""
    policy = Fixed(nodes if drafter else 0)
    engine = Engine(target, drafter, verifier, models=models, policy=policy, in_flight=in_flight)
    requests = [
        Request(str(index), prompt, NEW_TOKENS, sampling or Sampling(), seed=index)
        for index, prompt in enumerate(prompts)
    ]
    results = {result.id: result.token_ids for result in engine.decode(requests)}
    return [results[request.id] for request in requests]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_plain_decoding_gives_the_tokens_of_generate(target, prompts, generated, in_flight):
    assert decoded(target, prompts, in_flight=in_flight) == generated


@pytest.mark.parametrize("config", DRAFTERS, ids=lambda path: path.stem)
def test_greedy_tokens_are_those_of_generate(target, prompts, generated, models, config):
    assert decoded(target, prompts, build(config), models=models, in_flight=2) == generated


@pytest.mark.parametrize("config", VERIFIERS, ids=lambda path: path.stem)
def test_every_verifier_is_greedy_at_temperature_0(target, prompts, generated, models, config):
    drafter = build(next(path for path in DRAFTERS if path.stem == "draft_model"))
    assert decoded(target, prompts, drafter, build(config), models=models) == generated


@pytest.mark.parametrize("config", VERIFIERS, ids=lambda path: path.stem)
def test_sampled_drafts_are_verified_on_the_device(target, prompts, models, config):
    verifier, sampling = build(config), Sampling(temperature=0.8, top_p=0.95)
    drafters = [build(path) for path in DRAFTERS]
    accepted = [
        drafter
        for drafter in drafters
        if verifier.refusal(drafter.draft_sampling(sampling), drafter.chains(), greedy=False) is None
    ]
    assert accepted
    for drafter in accepted[:3]:
        texts = [decoded(target, prompts, drafter, verifier, models, sampling, in_flight=2) for _ in range(2)]
        assert texts[0] == texts[1], "a seed gives one text"
        assert all(len(text) == NEW_TOKENS for text in texts[0])


def test_a_seed_gives_one_text_whatever_is_drafted(target, prompts, models):
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1)
    plain = decoded(target, prompts, sampling=sampling)
    for config in DRAFTERS:
        text = decoded(target, prompts, build(config), SampleAndMatch(), models=models, sampling=sampling)
        assert text == plain, config.stem


@pytest.mark.parametrize("path", ["fast", "transformers"])
def test_bfloat16_differs_from_float32_by_ties_alone(folder, device, prompts, models, path):
    exact = load_target(folder, torch.float32, device)
    reduced = load_target(folder, torch.bfloat16, device, path=path)
    for config in DRAFTERS:
        outputs = decoded(reduced, prompts, build(config), models=models, in_flight=2)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert check_ties(exact, prompt, output, torch.bfloat16).faults == 0, config.stem


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_by_kernels_give_the_logits_of_transformers(device, family, dtype, monkeypatch):
    if device == "cpu":
        if dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter computes bfloat16 wrongly")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Logits are of size 10; in bfloat16 each of the operations rounds to 8 bits.
    tolerance = 5e-4 if dtype == torch.float32 else 0.3
    check(family, dtype, device, tolerance, CudaGraphs() if device.startswith("cuda") else again)


@pytest.fixture(scope="module")
def recorded(folder, device):
    """The target whose passes are CUDA graphs; on a CPU, what stands in for them."""
    if device.startswith("cuda"):
        return load_target(folder, torch.float32, device, path="fast", compiled=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return FastTarget(build_decoder(model.config, ModelWeights(model, packs=False)), compiled=True, capture=tape)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_decoding_by_graphs_gives_the_tokens_of_generate(recorded, prompts, generated, models, in_flight):
    assert decoded(recorded, prompts, in_flight=in_flight) == generated
    drafter = build(next(path for path in DRAFTERS if path.stem == "draft_model"))
    assert decoded(recorded, prompts, drafter, models=models, in_flight=in_flight) == generated
    assert len(recorded._recorded) > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_graphs_are_eager_passes_and_wait_for_nothing(device, family, dtype):
    model = tiny.build(family).to(device, dtype)
    decoder = build_decoder(model.config, ModelWeights(model, packs=False))
    capture = None if device.startswith("cuda") else tape
    eager, graphs = FastTarget(decoder), FastTarget(decoder, compiled=True, capture=capture)
    outputs = []
    for target in (eager, graphs):
        target.reserve(2, 60)
        target.feature_layers = (1,)
        for slot, prompt in enumerate(([5, 17, 3, 60, 22, 9, 41, 8, 77, 30, 2, 54], [7, 8, 9, 4])):
            target.prefill(slot, prompt)
        rows = []
        for repetition in range(3):
            if device.startswith("cuda") and repetition:
                torch.cuda.set_sync_debug_mode("error")
            try:
                parts = target.forward([0, 1], [[11, 12, 13, 14, 15 + repetition]] * 2, [[-1, 0, 0, 1, 2]] * 2)
            finally:
                if device.startswith("cuda"):
                    torch.cuda.set_sync_debug_mode("default")
            for slot in range(2):
                target.commit(slot, [0, 2])
            rows += [parts.logits, parts.hidden, parts.features]
        outputs.append(rows)
    assert len(graphs._recorded) == 1
    # Of more rows and of masked positions, sums run in another order; logits are of size 10.
    tolerance = 5e-4 if dtype == torch.float32 else 0.3
    for expected, found in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
