"""What a run stores: tables of Parquet parts, its directory and lock, videos, copies of models."""
