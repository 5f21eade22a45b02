from benchmarks.compare.regression import main

raise SystemExit(main())
