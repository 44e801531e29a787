"""The digits classifier as a Prefect flow that survives being killed.

Deployed by ``deployments/prefect.yaml``, or served: ``python flows/train.py``. Copy it for a
training function of your own. Store, registry and schedule come from ``CKPT_TASKS_STORE_URL``,
``CKPT_TASKS_REGISTRY_TRACKING_URI``, ``CKPT_TASKS_SCHEDULE_EVERY`` and their like, in the
environment of the worker or in the deployment's job variables.
"""

from ckpt_tasks.integrations.prefect import TAG, resumable_flow

train_digits = resumable_flow("ckpt_tasks.demo.digits:train", name="train-digits", retries=3)

if __name__ == "__main__":
    train_digits.serve("digits", tags=[TAG])
