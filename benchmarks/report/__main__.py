from benchmarks.report.writer import main

main()
