"""The digits classifier as a Prefect flow that survives being killed.

Deployed by ``deployments/prefect.yaml``, or served: ``python flows/train.py``. Copy it for a
training function of your own. Store and registry come from ``CKPT_TASKS_STORE_URL``,
``CKPT_TASKS_REGISTRY_TRACKING_URI`` and their like, in the environment of the worker.
"""

from ckpt_tasks import load_config
from ckpt_tasks.config import ScheduleConfig
from ckpt_tasks.integrations.prefect import TAG, resumable_flow

config = load_config()

train_digits = resumable_flow(
    "ckpt_tasks.demo.digits:train",
    name="train-digits",
    store=config.store,
    registry=config.registry,
    schedule=ScheduleConfig(every_epochs=1, every=600),
    retries=3,
)

if __name__ == "__main__":
    train_digits.serve("digits", tags=[TAG])
