"""The maintenance of a store as a Prefect flow: reconcile, expire, collect, report.

Deployed by ``deployments/prefect.yaml``, each night. Store, rules and registry come from
``CKPT_TASKS_STORE_URL``, ``CKPT_TASKS_RETENTION_LATEST``, ``CKPT_TASKS_REGISTRY_TRACKING_URI`` and
their like, in the environment of the worker or in the deployment's job variables.
"""

from ckpt_tasks.integrations.prefect import maintenance_flow

maintain = maintenance_flow(name="maintain")

if __name__ == "__main__":
    maintain.serve("nightly", cron="30 2 * * *")
