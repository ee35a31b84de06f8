// What the conformance suite runs in its pods, in one static program: `server` says what it was asked, `client` asks and
// prints the answers. It takes the place of the image that the suite's manifests name, which comes from a registry.
//
// It is written against what the suite reads (conformance/utils/echo/parse.go), and knows the flags that the suite's
// manifests and tests pass; any other is an error. It differs from the image in this: RPCs are those of the suite's own
// gRPC service; a TLS port without certificate files has a certificate of its own; there is no UDP, WebSocket, HTTP/3,
// forwarding, following of redirects or compression.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if err := run(filepath.Base(os.Args[0]), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(name string, arguments []string) error {
	switch name {
	case "client":
		return client(arguments, os.Stdout)
	case "server":
		return server(arguments)
	}
	return fmt.Errorf("this is server or client, not %s", name)
}

// Takes flags and, wherever it stands among them, at most one argument.
func parse(flags *flag.FlagSet, arguments []string) (string, error) {
	var argument string
	for {
		if err := flags.Parse(arguments); err != nil {
			return "", err
		}
		if flags.NArg() == 0 {
			return argument, nil
		}
		if argument != "" {
			return "", fmt.Errorf("%s takes one argument: %q, %q", flags.Name(), argument, flags.Arg(0))
		}
		argument, arguments = flags.Arg(0), flags.Args()[1:]
	}
}

// A flag that may be given several times.
func many(flags *flag.FlagSet, name, usage string) *[]string {
	values := []string{}
	flags.Func(name, usage, func(value string) error {
		values = append(values, value)
		return nil
	})
	return &values
}
