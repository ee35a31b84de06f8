package main

import (
	_ "embed"
	"fmt"
	"io"
	"log"
	"net/http"
	"sync"

	"golang.org/x/net/websocket"
)

// A page that tries what browsers do with HTTP.
//
//go:embed page.html
var page []byte

// A WebSocket's message: text or bytes.
type message struct {
	kind byte
	data []byte
}

var messages = websocket.Codec{
	Marshal: func(value any) ([]byte, byte, error) {
		message := value.(message)
		return message.data, message.kind, nil
	},
	Unmarshal: func(data []byte, kind byte, value any) error {
		*value.(*message) = message{kind, data}
		return nil
	},
}

// Adds what that page asks for. All of it is asked of this one server, by one browser.
func pages(handler *http.ServeMux) {
	seen := make(chan string, 3)
	reported := make(chan struct{})
	var report sync.Once

	handler.HandleFunc("GET /browser/page", func(to http.ResponseWriter, _ *http.Request) {
		to.Header().Set("Content-Type", "text/html")
		_, _ = to.Write(page)
	})
	// Sends two events, the second when the first was seen, and ends; to a browser that is back, the one after its last.
	handler.HandleFunc("GET /browser/events", func(to http.ResponseWriter, request *http.Request) {
		to.Header().Set("Content-Type", "text/event-stream")
		last := request.Header.Get("Last-Event-ID")
		fmt.Fprint(to, "retry: 1\n\n")
		for _, id := range map[string][]string{"": {"1", "2"}, "2": {"3"}}[last] {
			fmt.Fprintf(to, "id: %s\ndata: %s after [%s]\n\n", id, id, last)
			to.(http.Flusher).Flush()
			select {
			case <-seen:
			case <-request.Context().Done():
			}
		}
	})
	handler.HandleFunc("POST /browser/seen", func(_ http.ResponseWriter, request *http.Request) {
		body, _ := io.ReadAll(request.Body)
		seen <- string(body)
	})
	handler.Handle("/browser/socket", websocket.Handler(func(socket *websocket.Conn) {
		// Says its own end, too, once the browser has.
		defer socket.Close()
		var heard message
		for messages.Receive(socket, &heard) == nil {
			if err := messages.Send(socket, heard); err != nil {
				log.Printf("sending a message back: %v", err)
			}
		}
	}))
	handler.HandleFunc("POST /browser/report", func(_ http.ResponseWriter, request *http.Request) {
		body, _ := io.ReadAll(request.Body)
		log.Printf("reported %s", body)
		report.Do(func() { close(reported) })
	})
	handler.HandleFunc("GET /browser/end", func(to http.ResponseWriter, request *http.Request) {
		select {
		case <-reported:
		case <-request.Context().Done():
		}
		to.WriteHeader(http.StatusNoContent)
	})
}
