"""Checkpoint and resume for PyTorch training under Prefect and Airflow, registered in MLflow."""

__version__ = "0.1.0"
