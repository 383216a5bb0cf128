"""Options of `hasten train_drafter`."""

from dataclasses import dataclass

from hasten.jobs.common.schema import DEVICES, DTYPES, MODEL, SOURCE, Run, option, section


@dataclass
class DrafterText:
    """Tokens that a drafter's network is trained on."""

    source: str = option("library", f"text to train on: {SOURCE}", path="in")
    sequences: int = option(512, "sequences to train on", at_least=1)
    held_out: int = option(64, "sequences to measure on; of the library from its held-out files", at_least=1)
    sequence_length: int = option(256, "tokens in a sequence", at_least=2)
    seed: int = option(0, "which sequences of the source are drawn", at_least=0)
    batch: int = option(8, "sequences that run through the models at once", at_least=1)


@dataclass
class TrainDrafterConfig(Run):
    """Train the network that a drafter needs, for one target and one draft model."""

    target: str = option("embedded:target", f"model that is to be sped up: {MODEL}", path="in")
    draft: str = option("embedded:draft", f"smaller model of the same tokenizer: {MODEL}", path="in")
    drafter: str = option(
        "specdec_pp", "what to train: of specdec_pp the head that predicts acceptance", choices=("specdec_pp",)
    )
    blocks: int = option(3, "residual blocks of the head", at_least=0)
    mixing: float = option(
        0.15, "share of the text's own tokens that stay, all others are the draft model's", at_least=0, at_most=0.99
    )
    reject_weight: float = option(6.0, "weight of the loss on rejections", at_least=0.01)
    epochs: int = option(3, "passes over the tokens", at_least=1)
    lr: float = option(1e-3, "learning rate, which rises at first and falls as a cosine", at_least=1e-9)
    batch: int = option(256, "tokens a step", at_least=1)
    dtype: str = option("float32", "dtype of the models' arithmetic", choices=DTYPES)
    device: str = option("auto", "where the models compute; auto is cuda where there is one", choices=DEVICES)
    threads: int = option(1, "threads", at_least=1)
    output: str | None = option(
        None, "file of the trained network, must be new; null is acceptance_head.safetensors in run_dir", path="out"
    )
    text: DrafterText = section(DrafterText)
