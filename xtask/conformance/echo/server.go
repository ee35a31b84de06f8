package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	pb "sigs.k8s.io/gateway-api/conformance/echo-basic/grpcechoserver"
)

// Where it listens when nobody says so, as the suite's consumer does not.
const usualPort = "8080"

// Serves until one of its ports fails.
func server(arguments []string) error {
	flags := flag.NewFlagSet("server", flag.ContinueOnError)
	https := many(flags, "port", "HTTP/1.1 and HTTP/2 on this port")
	secure := many(flags, "tls", "the HTTP on this port is in TLS")
	rpcs := many(flags, "grpc", "gRPC on this port")
	tcps := many(flags, "tcp", "TCP on this port")
	certificate := flags.String("crt", "", "file of the certificate for TLS")
	key := flags.String("key", "", "file of its key")
	stray, err := parse(flags, arguments)
	if err != nil {
		return err
	}
	if stray != "" {
		return fmt.Errorf("server takes flags only; there is %q", stray)
	}
	if len(*https)+len(*rpcs)+len(*tcps) == 0 {
		*https = []string{usualPort}
	}
	own, err := keyPair(*certificate, *key)
	if err != nil {
		return err
	}
	ended := make(chan error)
	listen := func(ports []string, serve func(net.Listener) error) error {
		for _, port := range ports {
			listener, err := net.Listen("tcp", net.JoinHostPort("", port))
			if err != nil {
				return err
			}
			go func() { ended <- fmt.Errorf("port %s: %w", port, serve(listener)) }()
		}
		return nil
	}
	err = errors.Join(
		listen(*tcps, serveTCP),
		listen(*rpcs, serveGRPC),
		listen(*https, func(listener net.Listener) error {
			_, port, _ := net.SplitHostPort(listener.Addr().String())
			return serveHTTP(listener, port, slices.Contains(*secure, port), own)
		}),
	)
	if err != nil {
		return err
	}
	return <-ended
}

func serveHTTP(listener net.Listener, port string, inTLS bool, own tls.Certificate) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler:   http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answerHTTP(w, r, port) }),
		Protocols: protocols,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{own}},
	}
	if inTLS {
		return server.ServeTLS(listener, "", "")
	}
	return server.Serve(listener)
}

// A line for each thing that was asked.
func answerHTTP(w http.ResponseWriter, r *http.Request, port string) {
	w.Header().Set("Content-Type", "text/plain")
	asker, _, _ := net.SplitHostPort(r.RemoteAddr)
	alpn := ""
	if r.TLS != nil {
		alpn = r.TLS.NegotiatedProtocol
	}
	fields := [][2]string{
		{"ServicePort", port},
		{"Host", r.Host},
		// As it was sent: neither cleaned nor decoded.
		{"URL", r.RequestURI},
		{"Method", r.Method},
		{"Proto", r.Proto},
		{"Alpn", alpn},
		{"IP", asker},
		{"Hostname", hostname()},
	}
	for _, field := range fields {
		fmt.Fprintf(w, "%s=%s\n", field[0], field[1])
	}
	for name, values := range r.Header {
		for _, value := range values {
			fmt.Fprintf(w, "RequestHeader=%s:%s\n", name, value)
		}
	}
}

// The pod's name.
func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return ""
	}
	return name
}

// Says who it is once it has heard something, then what it hears.
func serveTCP(listener net.Listener) error {
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer connection.Close()
			heard := make([]byte, 4096)
			read, err := connection.Read(heard)
			if err != nil {
				return
			}
			fmt.Fprintf(connection, "Hostname=%s\n%s", hostname(), heard[:read])
			_, _ = io.Copy(connection, connection)
		}()
	}
}

// The suite's own service.
type echo struct {
	pb.UnimplementedGrpcEchoServer
}

func serveGRPC(listener net.Listener) error {
	server := grpc.NewServer()
	pb.RegisterGrpcEchoServer(server, echo{})
	return server.Serve(listener)
}

func (echo) Echo(ctx context.Context, asked *pb.EchoRequest) (*pb.EchoResponse, error) {
	method, _ := grpc.Method(ctx)
	said := &pb.Assertions{FullyQualifiedMethod: method, Context: &pb.Context{Pod: hostname()}}
	sent, _ := metadata.FromIncomingContext(ctx)
	for name, values := range sent {
		for _, value := range values {
			if name == ":authority" {
				said.Authority = value
				continue
			}
			said.Headers = append(said.Headers, &pb.Header{Key: name, Value: value})
		}
	}
	return &pb.EchoResponse{Assertions: said, Request: asked}, nil
}

// From files, or, where they are not there, made for the occasion: nobody here checks it.
func keyPair(certificate, key string) (tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(certificate, key)
	if certificate != "" && !errors.Is(err, fs.ErrNotExist) {
		return pair, err
	}
	made, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{"echo"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(1, 0, 0),
	}
	signed, err := x509.CreateCertificate(rand.Reader, template, template, &made.PublicKey, made)
	return tls.Certificate{Certificate: [][]byte{signed}, PrivateKey: made}, err
}
