// The conformance suite of the Gateway API, as it is: its flags say what is run, and against which cluster KUBECONFIG does.
package conformance

import (
	"testing"

	"sigs.k8s.io/gateway-api/conformance"
)

func TestConformance(t *testing.T) { conformance.RunConformance(t) }
