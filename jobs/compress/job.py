"""`hasten compress`: the descriptor."""

from hasten.jobs.compress.options import CompressConfig
from hasten.jobs.descriptors.descriptor import Job
from hasten.jobs.descriptors.metrics import CHECKPOINT

JOB = Job(
    name="compress",
    position=10,
    options=CompressConfig,
    run="hasten.jobs.compress.run:run",
    estimate="hasten.jobs.compress.estimate:estimate",
    metrics=CHECKPOINT,
    objectives=("kl_divergence", "bytes"),
    examples=(
        "hasten compress",
        "hasten compress model=/models/llama quantizer=gptq bits=3 output=/models/llama-w3 workers=8",
        "hasten compress quantizer=round_to_nearest bits=8 group_size=-1 symmetric=true",
        "hasten compress quantizer=round_to_nearest transforms=[awq] transform.awq.grid=10",
        "hasten compress scheme=nvfp4a16 model=/models/llama output=/models/llama-nvfp4",
        "hasten compress format=gguf scheme=q4_k model=/models/llama output=/models/llama-q4_k",
        "hasten compress quantizer.act_order=none ignore='[.*down_proj]' calibration.source=text.jsonl",
        "hasten compress --multirun bits=2,3,4 'quantizer=glob(*)' group_size=64,128",
        "hasten compress --multirun bits=3,4 'quantizer.damping=tag(log,interval(0.001,0.1))' sweep.trials=30",
    ),
)
