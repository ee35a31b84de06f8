package main

import (
	"bytes"
	"net"
	"slices"
	"strings"
	"testing"

	suite "sigs.k8s.io/gateway-api/conformance/utils/echo"
)

// Asks a port of this machine, and returns what the suite reads of what is printed, answer by answer.
func asked(t *testing.T, scheme string, serve func(net.Listener) error, arguments ...string) []suite.Response {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() { _ = serve(listener) }()
	var out bytes.Buffer
	// The suite names what is asked for first.
	arguments = slices.Insert(arguments, 0, scheme+"://"+listener.Addr().String()+"/a//b%2Fc?d=e")
	if err := client(arguments, &out); err != nil {
		t.Fatal(err)
	}
	var read []suite.Response
	for part := range strings.SplitSeq(strings.TrimSpace(out.String()), "\n\n") {
		read = append(read, suite.ParseResponse(part))
	}
	return read
}

func same(t *testing.T, what string, got, wanted any) {
	t.Helper()
	if got != wanted {
		t.Errorf("%s: %q, not %q", what, got, wanted)
	}
}

func web(inTLS bool) func(net.Listener) error {
	return func(listener net.Listener) error {
		own, err := keyPair("/cert.crt", "/key.crt")
		if err != nil {
			return err
		}
		return serveHTTP(listener, "8080", inTLS, own)
	}
}

func TestTheSuiteReadsAnswersOverHTTP(t *testing.T) {
	for scheme, inTLS := range map[string]bool{"http": false, "https": true} {
		read := asked(t, scheme, web(inTLS), "--method=POST", "-H", "x-one:1", "-H", "Host:elsewhere", "-H", "x-one:2")
		same(t, "answers", len(read), 1)
		same(t, "code", read[0].Code, "200")
		same(t, "method", read[0].Method, "POST")
		same(t, "protocol", read[0].Protocol, "HTTP/1.1")
		same(t, "host", read[0].Host, "elsewhere")
		same(t, "url", read[0].URL, "/a//b%2Fc?d=e")
		same(t, "port", read[0].Port, "8080")
		same(t, "pod", read[0].Hostname, hostname())
		same(t, "header", strings.Join(read[0].RequestHeaders.Values("X-One"), ","), "1,2")
		same(t, "response's header", read[0].ResponseHeaders.Get("Content-Type"), "text/plain")
	}
}

func TestTheSuiteReadsAnswersOverGRPC(t *testing.T) {
	read := asked(t, "grpc", serveGRPC, "-H", "x-one:1", "-H", "Host:elsewhere")
	same(t, "answers", len(read), 1)
	same(t, "code", read[0].Code, "200")
	same(t, "host", read[0].Host, "elsewhere")
	same(t, "pod", read[0].Hostname, hostname())
	same(t, "header", read[0].RequestHeaders.Get("X-One"), "1")
}

func TestManyAreAskedAndAllAreAnswered(t *testing.T) {
	for scheme, serve := range map[string]func(net.Listener) error{"http": web(false), "grpc": serveGRPC} {
		read := asked(t, scheme, serve, "--count=50")
		same(t, "answers", len(read), 50)
		for _, one := range read {
			same(t, "pod", one.Hostname, hostname())
		}
	}
}

func TestWhatIsNotKnownIsAnError(t *testing.T) {
	for _, arguments := range [][]string{
		{"http://127.0.0.1/", "--compression=gzip"},
		{"udp://127.0.0.1/"},
		{"http://127.0.0.1/", "http://127.0.0.1/"},
		{"http://127.0.0.1/", "-H", "no-value"},
	} {
		if err := client(arguments, &bytes.Buffer{}); err == nil {
			t.Errorf("%q is no error", arguments)
		}
	}
}
