"""``dags/train.py`` with a GPU for the train task, and for no other, under KubernetesExecutor."""

import os

from kubernetes.client import models as k8s

from ckpt_tasks import load_config
from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.integrations.airflow import resumable_dag

GRACE = 240
"""Seconds: more than `attempt.grace` and `attempt.drain` together."""

train_digits_on_gpu = resumable_dag(
    "ckpt_tasks.demo.digits:train",
    dag_id="train-digits-on-gpu",
    registry=load_config().registry,
    schedule=ScheduleConfig(every_epochs=1, every=600),
    python=os.environ.get("CKPT_TASKS_DAGS_PYTHON"),
    tags=["ckpt-tasks"],
)
# What the pod template has stays; the executor's container is named "base".
train_digits_on_gpu.get_task("train").executor_config = {
    "pod_override": k8s.V1Pod(
        spec=k8s.V1PodSpec(
            termination_grace_period_seconds=GRACE,
            containers=[
                k8s.V1Container(
                    name="base",
                    resources=k8s.V1ResourceRequirements(limits={"nvidia.com/gpu": "1"}),
                    volume_mounts=[k8s.V1VolumeMount(name="shm", mount_path="/dev/shm")],  # noqa: S108
                )
            ],
            volumes=[
                # Loader workers and NCCL pass data through it; a container has 64 MB by default.
                k8s.V1Volume(
                    name="shm",
                    empty_dir=k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit="8Gi"),
                )
            ],
        )
    )
}
