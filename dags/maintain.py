"""The maintenance of a store as an Airflow DAG: reconcile, expire, collect, report; each day.

Store, rules and registry come from ``CKPT_TASKS_STORE_URL``, ``CKPT_TASKS_RETENTION_LATEST``,
``CKPT_TASKS_REGISTRY_TRACKING_URI`` and their like, in the environment of the worker; or from
Airflow connections: ``ckpt_conn_id``, ``mlflow_conn_id``. It needs no torch.
"""

from ckpt_tasks.integrations.airflow import maintenance_dag

maintain = maintenance_dag(dag_id="maintain", tags=["ckpt-tasks"])
