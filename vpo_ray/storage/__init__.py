"""What a run keeps: tables of Parquet parts, its directory and lock, videos, copies of models."""
