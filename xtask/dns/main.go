// CoreDNS with what a test cluster needs of it: names of services and pods, and a sign that it is ready.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/ready"
)

func main() {
	// Those that the configuration may name, in the order in which they see a question.
	dnsserver.Directives = []string{"ready", "errors", "kubernetes"}
	coremain.Run()
}
