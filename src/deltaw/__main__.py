from deltaw.cli.main import main

main()
