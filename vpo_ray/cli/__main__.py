"""`python -m vpo_ray.cli` is `vpo`."""

from vpo_ray.cli.main import main

raise SystemExit(main())
