package main

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	pb "sigs.k8s.io/gateway-api/conformance/echo-basic/grpcechoserver"
)

const (
	// How long one request may take.
	limit = 10 * time.Second
	// How many requests are on their way at once.
	atOnce = 20
)

// Asks once.
type ask func(ctx context.Context) (answer, error)

// What is printed of an answer: lines NAME=VALUE about it, and those that are in it.
type answer struct{ about, body []string }

// Asks as often as it is told, and prints the answers in the order of the questions. One that is missing fails it all.
func client(arguments []string, out io.Writer) error {
	flags := flag.NewFlagSet("client", flag.ContinueOnError)
	method := flags.String("method", http.MethodGet, "the HTTP method")
	headers := many(flags, "H", "a header, NAME:VALUE; Host sets the host that is asked for")
	count := flags.Int("count", 1, "how often")
	address, err := parse(flags, arguments)
	if err != nil {
		return err
	}
	target, err := url.Parse(address)
	if err != nil {
		return err
	}
	sent := http.Header{}
	for _, header := range *headers {
		name, value, found := strings.Cut(header, ":")
		if !found {
			return fmt.Errorf("a header is NAME:VALUE, not %q", header)
		}
		sent.Add(name, strings.TrimSpace(value))
	}
	host := sent.Get("Host")
	sent.Del("Host")

	var one ask
	switch target.Scheme {
	case "http", "https":
		one = overHTTP(*method, address, host, sent)
	case "grpc":
		// One connection for all RPCs, as gRPC's clients have: what balances them has to look at each.
		options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority(host)}
		connection, err := grpc.NewClient("passthrough:///"+target.Host, options...)
		if err != nil {
			return err
		}
		defer connection.Close()
		one = overGRPC(pb.NewGrpcEchoClient(connection), sent)
	default:
		return fmt.Errorf("http, https or grpc, not %q", address)
	}
	answers, err := repeated(one, *count)
	for number, got := range answers {
		got.print(out, number, address)
	}
	return err
}

// All answers, or an error if one is missing.
func repeated(one ask, count int) ([]answer, error) {
	answers, errs := make([]answer, count), make([]error, count)
	places := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for number := range count {
		places <- struct{}{}
		all.Go(func() {
			defer func() { <-places }()
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			answers[number], errs[number] = one(ctx)
		})
	}
	all.Wait()
	for number, err := range errs {
		if err != nil {
			return nil, fmt.Errorf("request %d of %d: %w", number+1, count, err)
		}
	}
	return answers, nil
}

// As the suite reads it; an empty line ends an answer.
func (a answer) print(out io.Writer, number int, address string) {
	fmt.Fprintf(out, "[%d] Url=%s\n", number, address)
	for _, line := range a.about {
		fmt.Fprintf(out, "[%d] %s\n", number, line)
	}
	for _, line := range a.body {
		fmt.Fprintf(out, "[%d body] %s\n", number, line)
	}
	fmt.Fprintln(out)
}

// Each request has a connection of its own.
func overHTTP(method, address, host string, headers http.Header) ask {
	asker := &http.Client{
		Transport: &http.Transport{
			DisableKeepAlives:  true,
			DisableCompression: true,
			TLSClientConfig:    &tls.Config{InsecureSkipVerify: true},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return func(ctx context.Context) (answer, error) {
		request, err := http.NewRequestWithContext(ctx, method, address, nil)
		if err != nil {
			return answer{}, err
		}
		request.Header = headers.Clone()
		if host != "" {
			request.Host = host
		}
		response, err := asker.Do(request)
		if err != nil {
			return answer{}, err
		}
		defer response.Body.Close()
		about := []string{fmt.Sprintf("StatusCode=%d", response.StatusCode)}
		about = append(about, fields("ResponseHeader", response.Header)...)
		body, err := io.ReadAll(response.Body)
		// An empty line would end the answer.
		return answer{about, strings.FieldsFunc(string(body), func(c rune) bool { return c == '\n' })}, err
	}
}

// A status that is not OK is an error, as the suite wants it.
func overGRPC(service pb.GrpcEchoClient, headers http.Header) ask {
	sent := metadata.MD{}
	for name, values := range headers {
		sent.Append(name, values...)
	}
	return func(ctx context.Context) (answer, error) {
		var received metadata.MD
		said, err := service.Echo(metadata.NewOutgoingContext(ctx, sent), &pb.EchoRequest{}, grpc.Header(&received))
		if err != nil {
			return answer{}, err
		}
		heard := said.GetAssertions()
		body := []string{
			"Host=" + heard.GetAuthority(),
			"URL=" + heard.GetFullyQualifiedMethod(),
			"Hostname=" + heard.GetContext().GetPod(),
		}
		for _, header := range heard.GetHeaders() {
			body = append(body, fmt.Sprintf("RequestHeader=%s:%s", header.GetKey(), header.GetValue()))
		}
		// The suite has HTTP's codes for gRPC too.
		return answer{append(fields("ResponseHeader", received), "StatusCode=200"), body}, nil
	}
}

// Lines NAME=KEY:VALUE.
func fields(name string, values map[string][]string) (lines []string) {
	for key, of := range values {
		for _, value := range of {
			lines = append(lines, fmt.Sprintf("%s=%s:%s", name, key, value))
		}
	}
	return lines
}
